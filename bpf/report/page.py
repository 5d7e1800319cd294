"""The page of a report: sections and inlined figures in one HTML file."""

import datetime
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bpf import __version__
from bpf.experiment import Experiment
from bpf.extras import need
from bpf.files import write_text
from bpf.report.figures import Palette, inline_svg, save
from bpf.report.sections import Block, Section, across, block, sections


def write(experiments: Sequence[Experiment], output: Path, figures: str | None) -> list[Path]:
    """See `bpf.report.report`."""
    jinja2 = need("jinja2", "A report", "jinja2", "report")
    palette = Palette([rule for experiment in experiments for rule in experiment.grid.algorithm])
    blocks = [block(f"e{number}", one, palette) for number, one in enumerate(experiments, 1)]
    written = [output]
    groups: list[dict[str, Any]] = []
    if len(blocks) > 1:
        groups.append(_group("all", "All experiments", [across(blocks)], None))
    for one in blocks:
        made = list(sections(one))
        groups.append(_group(one.name, one.experiment.name, made, one))
        written += _save(one, made, output, figures, len(blocks) > 1) if figures else []
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    now = datetime.datetime.now(datetime.UTC)
    title = ", ".join(one.experiment.name for one in blocks)
    write_text(
        output,
        environment.get_template("page.html").render(
            title=title, groups=groups, made=f"{now:%Y-%m-%d %H:%M} UTC", version=__version__
        ),
    )
    return written


def _group(name: str, title: str, made: Sequence[Section], of: Block | None) -> dict[str, Any]:
    lead = ""
    if of is not None:
        spec = of.experiment.grid
        lead = f"{', '.join(of.rules)} on {spec.dataset}, {spec.problem_type}"
    shown = [
        {
            "section": section,
            "figures": [(one, inline_svg(one.figure, one.name)) for one in section.figures],
        }
        for section in made
    ]
    return {"name": name, "title": title, "lead": lead, "sections": shown}


def _save(of: Block, made: Sequence[Section], output: Path, kind: str, several: bool) -> Iterator[Path]:
    directory = output.parent / f"{output.stem}-figures"
    for section in made:
        for one in section.figures:
            name = one.name.removeprefix(f"{of.name}-")
            path = directory / f"{f'{of.experiment.name}-' if several else ''}{name}.{kind}".replace("/", "_")
            save(one.figure, path)
            yield path

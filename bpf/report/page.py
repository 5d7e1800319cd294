"""The page of a report: sections and inlined figures in one HTML file."""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bpf import __version__
from bpf.errors import UsageError, did_you_mean
from bpf.experiment.directory import Experiment
from bpf.extras import need
from bpf.files import check_output, write_text
from bpf.report.block import Block, Section, block, plain
from bpf.report.drawing import DARK, DRAWN, Palette, inline_svg, save
from bpf.report.sections import sections
from bpf.report.text_sections import across


def write(
    experiments: Sequence[Experiment], output: Path, figures: str | None, maps: Sequence[tuple[str, str]]
) -> list[Path]:
    """See `bpf.report.report`."""
    need("jinja2", "A report", "jinja2", "report")
    palette = Palette([rule for experiment in experiments for rule in experiment.grid.algorithm])
    blocks = [block(f"e{number}", one, palette, maps) for number, one in enumerate(experiments, 1)]
    _check_maps(blocks, maps)
    written = [output]
    groups: list[dict[str, Any]] = []
    if len(blocks) > 1:
        groups.append(_group("all", "All experiments", [across(blocks)], None))
    names = [one.experiment.name for one in blocks]
    for one in blocks:
        made = list(sections(one))
        groups.append(_group(one.name, one.experiment.name, made, one))
        own = one.experiment.name if names.count(one.experiment.name) == 1 else one.name
        prefix = f"{own}-" if len(blocks) > 1 else ""
        written += _save(one, made, output, figures, prefix) if figures else []
    _render(output, ", ".join(names), groups)
    return written


def _check_maps(blocks: Sequence[Block], maps: Sequence[tuple[str, str]]) -> None:
    """Raise UsageError for what is no parameter of any of the grids."""
    known = {name for one in blocks for row in one.rows for name in row.params}
    for parameter in (parameter for pair in maps for parameter in pair):
        if parameter not in known:
            where = " or ".join(str(one.experiment.directory) for one in blocks)
            handed_over = any(parameter == "lr" and one.experiment.grid.lr_from for one in blocks)
            why = " It was handed over." if handed_over else did_you_mean(parameter, known)
            raise UsageError(f"{parameter!r} is no parameter of the grid in {where}.{why}")


def _render(output: Path, title: str, groups: Sequence[dict[str, Any]]) -> None:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    now = datetime.datetime.now(datetime.UTC)
    template = environment.get_template("page.html")
    made = f"{now:%Y-%m-%d %H:%M} UTC"
    write_text(output, template.render(title=title, groups=groups, made=made, version=__version__, dark=DARK))


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


def _save(of: Block, made: Sequence[Section], output: Path, kind: str, prefix: str) -> list[Path]:
    directory = output.parent / f"{output.stem}-figures"
    drawn = [one for section in made for one in section.figures]
    paths = [directory / f"{plain(prefix + one.name.removeprefix(f'{of.name}-'))}.{kind}" for one in drawn]
    for path in paths:
        check_output(path, "figure of a report", DRAWN)
    for one, path in zip(drawn, paths, strict=True):
        save(one.figure, path)
    return paths

"""One page on experiments that opens anywhere and asks nobody for anything, and its figures as files."""

from collections.abc import Sequence
from pathlib import Path

from bpf.experiment.directory import Experiment

FORMATS = ("png", "svg", "pdf")


def report(
    experiments: Sequence[Experiment],
    output: Path,
    figures: str | None = None,
    maps: Sequence[tuple[str, str]] = (),
) -> list[Path]:
    """Write the page `output`, and with `figures` (one of `FORMATS`) its figures into `STEM-figures/` beside it.

    Its heat maps are of the pairs of parameters `maps`, or by default of the two that matter most for each rule.
    Returns what was written, the page first. Raises UsageError where a library is missing, a format or a parameter is
    unknown, an experiment has no study or a place cannot be written to.
    """
    from bpf.errors import UsageError, did_you_mean
    from bpf.report import drawing, page

    if figures is not None and figures not in FORMATS:
        raise UsageError(f"Figures are not written as {figures!r}.{did_you_mean(figures, FORMATS)}")
    drawing.check()
    return page.write(experiments, output, figures, maps)

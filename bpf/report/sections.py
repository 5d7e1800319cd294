"""The sections of a report on one experiment, in the order of its page."""

from collections.abc import Callable, Iterator

from bpf.report import figure_sections, text_sections
from bpf.report.block import Block, Section


def sections(block: Block) -> Iterator[Section]:
    """All sections that apply, one after the other, so that a page never holds more than it must."""
    makers: tuple[Callable[[Block], Section | None], ...] = (
        text_sections.run,
        text_sections.rows,
        text_sections.ranking,
        text_sections.pairs,
        figure_sections.learning_curves,
        figure_sections.learning_rates,
        figure_sections.heat_maps,
        figure_sections.main_effects,
        figure_sections.alignment,
        figure_sections.divergence,
        text_sections.coverage,
        figure_sections.reconstructions,
        text_sections.costs,
        text_sections.provenance,
    )
    yield from filter(None, (make(block) for make in makers))

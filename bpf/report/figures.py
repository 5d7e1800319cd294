"""The figures of a report's numbers, for a column 3.5 inches wide or, with several panels, for a page."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from bpf.report import drawing
from bpf.report.drawing import Palette
from bpf.report.tables import Band, Effect, Level, Map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bpf.report.images import Pixels

DECADES = 2
"""The colours of a map reach so far from its best value; what is worse has the last of them."""


def curves(bands: Mapping[str, Band], label: str, log: bool, palette: Palette) -> "Figure":
    """A score over epochs, mean ± std over executions, one line per rule."""
    figure, axes = drawing.one(2.3)
    factor = _factor(label)
    for rule, band in bands.items():
        axes.plot(band.x, [value * factor for value in band.mean], label=rule, **palette.line(rule))
    drawing.scale(axes, log, [value * factor for band in bands.values() for value in band.mean])
    for rule, band in bands.items():
        drawing.shade(axes, band, palette.colour(rule), factor)
    drawing.whole_numbers(axes)
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    drawing.legend(figure, axes)
    return figure


def sensitivity(by_rule: Mapping[str, Sequence[Level]], parameter: str, label: str, palette: Palette) -> "Figure":
    """Best objective by a numeric parameter, and the median beside it; a cross where every cell diverged."""
    several = any(one.best != one.median for levels in by_rule.values() for one in levels)
    shown = ("best", "median") if several else ("best",)
    figure, panels = drawing.panels(len(shown), 2.0)
    factor = _factor(label)
    known = sorted({float(one.value) for levels in by_rule.values() for one in levels})
    every = [
        value * factor for levels in by_rule.values() for one in levels for value in (one.best, one.median) if value
    ]
    log = "%" not in label and drawing.wide(every)
    for axes, which in zip(panels, shown, strict=True):
        scores: list[float] = []
        for number, (rule, levels) in enumerate(by_rule.items()):
            points = {float(one.value): value * factor for one in levels if (value := getattr(one, which)) is not None}
            scores += points.values()
            axes.plot(list(points), list(points.values()), label=rule, **palette.points(rule))
            lost = [float(one.value) for one in levels if one.diverged and not one.complete]
            height = [0.98 - 0.05 * number] * len(lost)
            axes.plot(lost, height, "x", color=palette.colour(rule), transform=axes.get_xaxis_transform(), markersize=4)
        drawing.scale(axes, log, scores)
        drawing.ticks_at(axes, known, parameter)
        axes.set_ylabel(label)
        axes.set_title(which if several else "")
    drawing.legend(figure, *panels)
    return figure


def effects(by_rule: Mapping[str, Sequence[Effect]], palette: Palette) -> "Figure":
    """One panel per parameter: the mean place of each of its values, one line per rule."""
    largest: dict[str, float] = {}
    for found in by_rule.values():
        for effect in found:
            largest[effect.parameter] = max(effect.size, largest.get(effect.parameter, 0.0))
    parameters = sorted(largest, key=lambda name: -largest[name])
    figure, panels = drawing.panels(len(parameters), 1.5)
    for axes, parameter in zip(panels, parameters, strict=True):
        of_rule = {r: e.places for r, found in by_rule.items() for e in found if e.parameter == parameter}
        values = list(dict.fromkeys(value for places in of_rule.values() for value in places))
        if all(isinstance(value, int | float) for value in values):
            values.sort(key=float)
        for number, (rule, places) in enumerate(of_rule.items()):
            shift = 0.05 * (number - (len(of_rule) - 1) / 2)  # so that no rule hides another
            at = [index for index, value in enumerate(values) if value in places]
            shifted = [index + shift for index in at]
            axes.plot(shifted, [places[values[index]] for index in at], label=rule, **palette.points(rule))
        axes.set_xlim(-0.3, len(values) - 0.7)
        axes.set_ylim(-0.03, 1.03)
        axes.set_yticks([0, 0.5, 1])
        drawing.words(axes, values)
        axes.set_xlabel(parameter)
        if _first(axes):
            axes.set_ylabel("mean place")
    drawing.legend(figure, *panels)
    return figure


def best_maps(by_rule: Mapping[str, Map], label: str) -> "Figure":
    """One panel per rule: the best objective by two parameters, in the same colours."""
    factor = _factor(label)
    known = [value for found in by_rule.values() for line in found.values for value in line if value is not None]
    positive = [value * factor for value in known if value > 0] or [1.0]
    low = min(positive)
    ends = low, min(max(positive), low * 10**DECADES)
    return _maps(by_rule, "viridis_r", ends, partial(drawing.short, zeros=True), factor)


def divergence(by_rule: Mapping[str, Map]) -> "Figure":
    """One panel per rule: the percentage of its cells that diverged, by two parameters."""
    return _maps(by_rule, "YlOrRd", (0.0, 100.0), lambda value: f"{value:.0f}", 100)


def tracked(
    by_statistic: Mapping[str, Mapping[str, Mapping[str, Band]]], tracker: str, looks: Mapping[str, dict[str, Any]]
) -> "Figure":
    """Measurements over epochs: panels of a statistic side by side, one per rule, with one line per layer."""
    rules = list(dict.fromkeys(rule for by_rule in by_statistic.values() for rule in by_rule))
    lines = -(-len(rules) // 5)
    columns = -(-len(rules) // lines)
    height = 1.3 if columns > 2 else 1.6
    width = drawing.PAGE if columns > 1 else drawing.COLUMN
    figure = drawing.blank(width, height * lines * len(by_statistic) + 0.3)
    grid = figure.subplots(lines * len(by_statistic), columns, squeeze=False)
    drawn: list[Axes] = []
    for number, (statistic, by_rule) in enumerate(by_statistic.items()):
        panels = list(grid[lines * number : lines * (number + 1)].flat)
        for spare in panels[len(rules) :]:
            spare.remove()
        values = [value for bands in by_rule.values() for band in bands.values() for value in band.mean]
        for place, (axes, rule) in enumerate(zip(panels, rules, strict=False)):
            if place:
                axes.sharey(panels[0])
                axes.tick_params(labelleft=_first(axes))
            for name, band in by_rule.get(rule, {}).items():
                axes.plot(band.x, band.mean, label=name, **looks[name])
            if min(values) < 0:
                axes.axhline(0, color=drawing.INK, linewidth=0.5, alpha=0.5)
            if _first(axes):
                axes.set_ylabel(f"{tracker}\n{statistic}".strip())
            if number == 0 or lines > 1:
                axes.set_title(rule)
            if number == len(by_statistic) - 1 and place + columns >= len(rules):
                axes.set_xlabel("epoch")
            drawing.whole_numbers(axes)
        drawing.scale(panels[0], drawing.wide(values), values)
        for axes, rule in zip(panels, rules, strict=False):
            for name, band in by_rule.get(rule, {}).items():
                drawing.shade(axes, band, looks[name]["color"])
        drawn += panels[: len(rules)]
    drawing.legend(figure, *sorted(drawn, key=lambda axes: -len(axes.get_legend_handles_labels()[1])))
    return figure


def reconstructions(originals: "Sequence[Pixels]", by_rule: "Mapping[str, Sequence[Pixels]]") -> "Figure":
    """The test images in the first row, and what each rule makes of them below."""
    rows = {"original": originals, **by_rule}
    figure = drawing.blank(drawing.COLUMN, 0.42 * len(rows))
    grid = figure.subplots(len(rows), len(originals), squeeze=False)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.01, wspace=0, hspace=0)
    for line, (name, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


def _maps(
    by_rule: Mapping[str, Map],
    shades: str,
    ends: tuple[float, float],
    write: Callable[[float], str],
    factor: float,
) -> "Figure":
    """Coloured tables, with their numbers as `write` has them, or with a bar where there is no room for numbers."""
    tallest = max(len(found.rows) for found in by_rule.values())
    widest = max(len(found.columns) for found in by_rule.values())
    figure, panels = drawing.panels(len(by_rule), 0.75 + 0.24 * tallest, 3 if widest <= 5 else 2)
    written = widest <= drawing.WRITTEN
    for axes, (rule, found) in zip(panels, by_rule.items(), strict=True):
        values = [[None if value is None else value * factor for value in line] for line in found.values]
        mesh = _mesh(axes, found, values, _shades(shades, ends), write if written else None)
        axes.set_title(rule)
        if not _first(axes) and found.row == next(iter(by_rule.values())).row:
            axes.set_ylabel("")
    if not written:
        beyond = any(
            (value or 0) * factor > ends[1] for found in by_rule.values() for line in found.values for value in line
        )
        bar = figure.colorbar(mesh, ax=panels, pad=0.02, aspect=15, shrink=0.9, extend="max" if beyond else "neither")
        bar.outline.set_visible(False)
        drawing.plain(bar.ax.yaxis)
    return figure


def _mesh(
    axes: "Axes",
    found: Map,
    values: Sequence[Sequence[float | None]],
    shades: Mapping[str, Any],
    write: Callable[[float], str] | None,
) -> Any:
    """A coloured table, its first row on top; a cross where all that ended diverged, a dash where nothing ended."""
    import numpy as np

    low, high = shades["norm"].vmin, shades["norm"].vmax
    filled = np.array([[math.nan if value is None else value for value in line] for line in values])
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(filled.clip(low, high)), **shades, edgecolors="face", linewidth=0.2, antialiased=True
    )
    axes.set_facecolor(drawing.MISSING)
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            middle: dict[str, Any] = {"x": j + 0.5, "y": i + 0.5, "ha": "center", "va": "center_baseline"}
            if value is None:
                axes.text(**middle, s="×" if found.counts[i][j] else "–", color=drawing.INK)
            elif write:
                red, green, blue = mesh.to_rgba(np.array([min(max(value, low), high)]))[0][:3]
                light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
                ink = "#010101" if light else "#fefefe"  # not drawing.INK: it stands on the shade, not on the page
                axes.text(**middle, s=write(value), color=ink, fontsize=7)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    drawing.words(axes, found.columns, 0.5)
    axes.set_yticks([i + 0.5 for i in range(len(found.rows))], [drawing.word(value) for value in found.rows])
    axes.invert_yaxis()
    axes.set_xlabel(found.column)
    axes.set_ylabel(found.row)
    return mesh


def _shades(name: str, ends: tuple[float, float]) -> dict[str, Any]:
    """Colours between two values, on a logarithmic scale where these are far apart."""
    from matplotlib.colors import LogNorm, Normalize

    low, high = ends
    log = drawing.wide(ends)
    if low == high:
        high = low + (abs(low) or 1.0) * 1e-6
    return {"cmap": name, "norm": (LogNorm if log else Normalize)(low, high)}


def _factor(label: str) -> float:
    return 100 if "%" in label else 1


def _first(axes: "Axes") -> bool:
    place = axes.get_subplotspec()
    return place is not None and place.is_first_col()

"""The figures of a report's numbers, for a column 3.5 inches wide, in the style of `drawing`."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bpf.report import drawing
from bpf.report.drawing import Palette
from bpf.report.tables import Band, Effect, Level, Map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bpf.report.images import Pixels


def curves(bands: Mapping[str, Band], label: str, palette: Palette) -> "Figure":
    """A score over epochs, mean ± std over executions, one line per rule."""
    figure, axes = drawing.one(2.3)
    scale = 100 if "%" in label else 1
    values = []
    for rule, band in bands.items():
        mean = [value * scale for value in band.mean]
        axes.plot(band.x, mean, label=rule, **palette.line(rule))
        values += mean
    drawing.log_if_wide(axes, values)
    for rule, band in bands.items():
        drawing.shade(axes, band, palette.colour(rule), scale)
    drawing.whole_numbers(axes)
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    drawing.legend(figure, axes)
    return figure


def sensitivity(by_rule: Mapping[str, Sequence[Level]], parameter: str, label: str, palette: Palette) -> "Figure":
    """Best (line) and median (faint line) objective by a numeric parameter; a cross where every cell diverged."""
    figure, axes = drawing.one(2.3)
    scale = 100 if "%" in label else 1
    scores = []
    for rule, levels in by_rule.items():
        for which in ("best", "median"):
            points = [(float(one.value), value) for one in levels if (value := getattr(one, which)) is not None]
            at, values = [x for x, _ in points], [value * scale for _, value in points]
            scores += values
            look = palette.points(rule) if which == "best" else palette.line(rule) | {"alpha": 0.5, "linewidth": 0.9}
            axes.plot(at, values, label=rule if which == "best" else None, **look)
    drawing.log_if_wide(axes, scores)
    drawing.ticks_at(axes, sorted({float(one.value) for levels in by_rule.values() for one in levels}), parameter)
    for number, (rule, levels) in enumerate(by_rule.items()):
        lost = [float(one.value) for one in levels if one.diverged and not one.complete]
        height = [0.98 - 0.05 * number] * len(lost)
        axes.plot(lost, height, "x", color=palette.colour(rule), transform=axes.get_xaxis_transform(), markersize=4)
    axes.set_ylabel(label)
    drawing.legend(figure, axes)
    return figure


def effects(by_rule: Mapping[str, Sequence[Effect]], palette: Palette) -> "Figure":
    """One panel per parameter: the mean place of each of its values, one line per rule."""
    largest: dict[str, float] = {}
    for found in by_rule.values():
        for effect in found:
            largest[effect.parameter] = max(effect.size, largest.get(effect.parameter, 0.0))
    parameters = sorted(largest, key=lambda name: -largest[name])
    figure, panels = drawing.panels(len(parameters), 1.35)
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
        drawing.words(axes, values, drawing.HALF)
        axes.set_xlabel(parameter)
        if axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
            axes.set_ylabel("mean place")
    drawing.legend(figure, *panels)
    return figure


def best_map(found: Map, label: str) -> "Figure":
    """The best objective by two parameters; a dash where no cell is complete."""
    figure, axes = drawing.one(0.6 + 0.3 * max(2, len(found.rows)))
    scale = 100 if "%" in label else 1
    values = [[None if value is None else value * scale for value in line] for line in found.values]
    written = len(found.columns) <= drawing.WRITTEN
    mesh = _mesh(axes, found, values, "viridis_r", drawing.FULL, drawing.short if written else None)
    if not written:
        bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=12)
        bar.outline.set_visible(False)
        drawing.plain(bar.ax.yaxis)
    return figure


def divergence(by_rule: Mapping[str, Map]) -> "Figure":
    """One panel per rule: the fraction of its cells that diverged, by two parameters."""
    tallest = max(len(found.rows) for found in by_rule.values())
    figure, panels = drawing.panels(len(by_rule), 0.7 + 0.26 * tallest)
    for axes, (rule, found) in zip(panels, by_rule.items(), strict=True):
        _mesh(axes, found, found.values, "YlOrRd", drawing.HALF, lambda value: f"{100 * value:.0f}", (0.0, 1.0))
        axes.set_title(rule)
        if not axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
            axes.set_ylabel("")
    return figure


def alignment(by_rule: Mapping[str, Mapping[str, Band]], tracker: str) -> "Figure":
    """One panel per rule: a measurement over epochs, one line per layer, from light (first) to dark (last)."""
    import matplotlib

    names = list(dict.fromkeys(name for bands in by_rule.values() for name in bands))
    shades = matplotlib.colormaps["plasma"]
    colour = {name: shades(0.35 + 0.45 * i / max(1, len(names) - 1)) for i, name in enumerate(names)}
    figure, panels = drawing.panels(len(by_rule), 1.45, sharey=True)
    for axes, (rule, bands) in zip(panels, by_rule.items(), strict=True):
        for number, (name, band) in enumerate(bands.items()):
            line = drawing.LINES[names.index(name) % len(drawing.LINES)]
            axes.plot(band.x, band.mean, label=name, color=colour[name], linestyle=line)
            drawing.shade(axes, band, colour[name])
            if number == 0:
                axes.axhline(0, color=drawing.INK, linewidth=0.5, alpha=0.5)
        axes.set_title(rule)
        drawing.whole_numbers(axes)
        axes.set_xlabel("epoch")
        if axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
            axes.set_ylabel(tracker)
    drawing.legend(figure, *panels)
    return figure


def reconstructions(originals: "Sequence[Pixels]", by_rule: "Mapping[str, Sequence[Pixels]]") -> "Figure":
    """The test images in the first row, and what each rule makes of them below."""
    rows = {"original": originals, **by_rule}
    figure = drawing.blank(0.42 * len(rows))
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


def _mesh(
    axes: "Axes",
    found: Map,
    values: Sequence[Sequence[float | None]],
    shades: str,
    room: int,
    written: Callable[[float], str] | None,
    ends: tuple[float, float] | None = None,
) -> Any:
    """A coloured table, its first row on top, with its numbers as `written`."""
    import numpy as np

    known = [value for line in values for value in line if value is not None]
    low, high = ends or (min(known, default=0.0), max(known, default=1.0))
    filled = np.array([[math.nan if value is None else value for value in line] for line in values])
    colour = _shades(shades, low, high, log=low > 0 and high / low > 20)
    mesh = axes.pcolormesh(np.ma.masked_invalid(filled), **colour, edgecolors="face", linewidth=0.2)
    axes.set_facecolor(drawing.MISSING)
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            if value is None:
                axes.text(j + 0.5, i + 0.5, "–", ha="center", va="center", color=drawing.INK)
                continue
            red, green, blue = mesh.to_rgba(np.array([value]))[0][:3]
            light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
            ink = "#010101" if light else "#fefefe"  # not drawing.INK: it stands on the shade, not on the page
            if written:
                axes.text(j + 0.5, i + 0.5, written(value), ha="center", va="center", color=ink, fontsize=7)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    drawing.words(axes, found.columns, room, 0.5)
    axes.set_yticks([i + 0.5 for i in range(len(found.rows))], [drawing.word(value) for value in found.rows])
    axes.invert_yaxis()
    axes.set_xlabel(found.column)
    axes.set_ylabel(found.row)
    return mesh


def _shades(name: str, low: float, high: float, log: bool) -> dict[str, Any]:
    from matplotlib.colors import LogNorm, Normalize

    if low == high:
        high = low + (abs(low) or 1.0) * 1e-6
    return {"cmap": name, "norm": (LogNorm if log else Normalize)(low, high)}

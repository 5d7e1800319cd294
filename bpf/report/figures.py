"""Figures of a report's numbers, for a column 3.5 inches wide. Needs matplotlib, which is imported here only.

Each rule has its own colour, line and marker in every figure; backpropagation, the control, has that of the text.
"""

import io
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpf import console
from bpf.extras import need
from bpf.report.tables import Band, Effect, Level, Map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bpf.report.images import Pixels

WIDTH = 3.5
INK = "#000000"
MISSING = "#99999955"
WRITTEN = 8
"""More columns of a map than these have no room for numbers."""
FULL, HALF = 46, 20
"""Letters that fit below an axis of the whole and of half the width."""

# Okabe and Ito 2008, without its yellow, which is not seen on white.
_FIXED = {"bp": INK, "dfa": "#0072B2", "drtp": "#D55E00", "ll-cce": "#009E73", "ll-mse": "#CC79A7"}
_OTHERS = ("#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")
_LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (5, 1, 1, 1)), (0, (8, 2)))
_MARKERS = "osD^vPX*<>"

_STYLE = {
    "font.size": 7.5,
    "font.family": "DejaVu Sans",
    "axes.labelsize": 7.5,
    "axes.titlesize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "text.parse_math": False,
    "axes.unicode_minus": True,
}


class Palette:
    """How each rule is drawn: fixed for the built-in ones, in the order of their names for the others."""

    def __init__(self, rules: Sequence[str]) -> None:
        others = sorted(set(rules) - set(_FIXED))
        order = [*_FIXED, *others]
        colours = [*_FIXED.values(), *itertools.islice(itertools.cycle(_OTHERS), len(others))]
        self._looks = {
            rule: {"color": colour, "linestyle": _LINES[i % len(_LINES)], "marker": _MARKERS[i % len(_MARKERS)]}
            for i, (rule, colour) in enumerate(zip(order, colours, strict=True))
        }

    def line(self, rule: str) -> dict[str, Any]:
        return {**self._looks[rule], "marker": ""}

    def points(self, rule: str) -> dict[str, Any]:
        return self._looks[rule]

    def colour(self, rule: str) -> str:
        return str(self._looks[rule]["color"])


def check() -> None:
    """Raises UsageError if the figures cannot be drawn here."""
    need("matplotlib", "A report", "matplotlib", "report")


def curves(bands: Mapping[str, Band], label: str, palette: Palette) -> "Figure":
    """A score over epochs, mean ± std over executions, one line per rule."""
    figure, axes = _figure(2.3)
    scale = 100 if "%" in label else 1
    values = []
    for rule, band in bands.items():
        mean = [value * scale for value in band.mean]
        axes.plot(band.x, mean, label=rule, **palette.line(rule))
        values += mean
    _log_if_wide(axes, values)
    for rule, band in bands.items():
        _shade(axes, band, palette.colour(rule), scale)
    _whole_numbers(axes)
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    _legend(figure, axes)
    return figure


def sensitivity(by_rule: Mapping[str, Sequence[Level]], parameter: str, label: str, palette: Palette) -> "Figure":
    """Best (line) and median (faint line) objective by a numeric parameter; a cross where every cell diverged."""
    figure, axes = _figure(2.3)
    scale = 100 if "%" in label else 1
    scores = []
    for rule, levels in by_rule.items():
        for which in ("best", "median"):
            points = [(float(one.value), value) for one in levels if (value := getattr(one, which)) is not None]
            at, values = [x for x, _ in points], [value * scale for _, value in points]
            scores += values
            look = palette.points(rule) if which == "best" else palette.line(rule) | {"alpha": 0.4, "linewidth": 0.9}
            axes.plot(at, values, label=rule if which == "best" else None, **look)
    _log_if_wide(axes, scores)
    _ticks_at(axes, sorted({float(one.value) for levels in by_rule.values() for one in levels}), parameter)
    for number, (rule, levels) in enumerate(by_rule.items()):
        lost = [float(one.value) for one in levels if one.diverged and not one.complete]
        height = [0.98 - 0.05 * number] * len(lost)
        axes.plot(lost, height, "x", color=palette.colour(rule), transform=axes.get_xaxis_transform(), markersize=4)
    axes.set_ylabel(label)
    _legend(figure, axes)
    return figure


def effects(by_rule: Mapping[str, Sequence[Effect]], palette: Palette) -> "Figure":
    """One panel per parameter: the mean place of each of its values, one line per rule."""
    largest: dict[str, float] = {}
    for found in by_rule.values():
        for effect in found:
            largest[effect.parameter] = max(effect.size, largest.get(effect.parameter, 0.0))
    parameters = sorted(largest, key=lambda name: -largest[name])
    figure, panels = _panels(len(parameters), 1.35)
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
        _words(axes, values, HALF)
        axes.set_xlabel(parameter)
        if axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
            axes.set_ylabel("mean place")
    _legend(figure, *panels)
    return figure


def best_map(found: Map, label: str) -> "Figure":
    """The best objective by two parameters; a dash where no cell is complete."""
    figure, axes = _figure(0.6 + 0.3 * max(2, len(found.rows)))
    scale = 100 if "%" in label else 1
    values = [[None if value is None else value * scale for value in line] for line in found.values]
    written = len(found.columns) <= WRITTEN
    mesh = _mesh(axes, found, values, "viridis_r", FULL, _short if written else None)
    if not written:
        bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=12)
        bar.outline.set_visible(False)  # type: ignore[operator]
        _plain(bar.ax.yaxis)
    return figure


def divergence(by_rule: Mapping[str, Map]) -> "Figure":
    """One panel per rule: the fraction of its cells that diverged, by two parameters."""
    tallest = max(len(found.rows) for found in by_rule.values())
    figure, panels = _panels(len(by_rule), 0.7 + 0.26 * tallest)
    for axes, (rule, found) in zip(panels, by_rule.items(), strict=True):
        _mesh(axes, found, found.values, "YlOrRd", HALF, lambda value: f"{100 * value:.0f}", (0.0, 1.0))
        axes.set_title(rule)
        if not axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
            axes.set_ylabel("")
    return figure


def alignment(by_rule: Mapping[str, Mapping[str, Band]], tracker: str) -> "Figure":
    """One panel per rule: a measurement over epochs, one line per layer, from light (first) to dark (last)."""
    import matplotlib

    names = list(dict.fromkeys(name for bands in by_rule.values() for name in bands))
    shades = matplotlib.colormaps["plasma"]
    colour = {name: shades(0.1 + 0.7 * i / max(1, len(names) - 1)) for i, name in enumerate(names)}
    figure, panels = _panels(len(by_rule), 1.45, sharey=True)
    for axes, (rule, bands) in zip(panels, by_rule.items(), strict=True):
        for number, (name, band) in enumerate(bands.items()):
            line = _LINES[names.index(name) % len(_LINES)]
            axes.plot(band.x, band.mean, label=name, color=colour[name], linestyle=line)
            _shade(axes, band, colour[name])
            if number == 0:
                axes.axhline(0, color=INK, linewidth=0.5, alpha=0.5)
        axes.set_title(rule)
        _whole_numbers(axes)
        axes.set_xlabel("epoch")
        if axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
            axes.set_ylabel(tracker)
    _legend(figure, *panels)
    return figure


def reconstructions(originals: "Sequence[Pixels]", by_rule: "Mapping[str, Sequence[Pixels]]") -> "Figure":
    """The test images in the first row, and what each rule makes of them below."""
    rows = {"original": originals, **by_rule}
    figure = _new(0.42 * len(rows))
    grid = figure.subplots(len(rows), len(originals), squeeze=False)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.01, wspace=0, hspace=0)  # type: ignore[union-attr]
    for line, (name, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


def styled(draw: "Callable[[], Figure]") -> "Figure":
    """Draw in the style of the report."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        return draw()


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as its name's ending says: on white for png, with nothing behind it for svg and pdf."""
    from bpf.files import write_atomically

    kind = path.suffix[1:]
    look = {"dpi": 300, "facecolor": "white"} if kind == "png" else {"transparent": True}
    write_atomically(path, lambda file: file.write(_bytes(figure, kind, **look)))


def inline_svg(figure: "Figure", name: str) -> str:
    """A figure as an element of a page: its text is text, black is the page's own colour, and no id is met twice.

    `name` must be unique in the page.
    """
    text = _bytes(figure, "svg", transparent=True).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r"\bid=\"", f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r"href=\"#", f'href="#{name}-', text)
    text = text.replace(INK, "currentColor").replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    # matplotlib leaves out the fill of black text and paths, as black is what SVG would take
    text = re.sub(r"<svg [^>]*viewBox=\"([^\"]*)\"[^>]*>", r'<svg viewBox="\1" role="img" fill="currentColor">', text)
    return text.strip()


def _bytes(figure: "Figure", kind: str, **look: Any) -> bytes:
    import matplotlib

    dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}  # the same numbers make the same files
    target = io.BytesIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "bpf"}):
        figure.savefig(target, format=kind, metadata=dated.get(kind), **look)
    return target.getvalue()


def _new(height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def _figure(height: float) -> "tuple[Figure, Axes]":
    figure = _new(height)
    return figure, figure.subplots()


def _panels(count: int, height: float, sharey: bool = False) -> "tuple[Figure, list[Axes]]":
    """Two panels a line, each `height` inches high."""
    columns = min(2, count)
    lines = -(-count // columns)
    figure = _new(height * lines + 0.3)
    panels = list(figure.subplots(lines, columns, squeeze=False, sharey=sharey).flat)
    for spare in panels[count:]:
        spare.remove()
    return figure, panels[:count]


def _shade(axes: "Axes", band: Band, colour: Any, scale: float = 1.0) -> None:
    """Mean ± std; on a logarithmic axis down to its end where the std is larger than the mean."""
    if band.std is None:
        return
    bottom = axes.get_ylim()[0] if axes.get_yscale() == "log" else -math.inf
    ends = [(mean * scale, std * scale) for mean, std in zip(band.mean, band.std, strict=True)]
    low = [max(mean - std, bottom) for mean, std in ends]
    axes.fill_between(band.x, low, [mean + std for mean, std in ends], color=colour, alpha=0.18, linewidth=0)


def _legend(figure: "Figure", *panels: "Axes") -> None:
    """Above the axes, so that it covers no data; each label once."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if len(handles) > 1:
        fitting = max(1, int(72 * WIDTH / (23 + 4.3 * max(map(len, handles)))))
        lines = -(-len(handles) // fitting)
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside upper center",
            ncols=-(-len(handles) // lines),
            handlelength=1.9,
            handletextpad=0.4,
            columnspacing=0.9,
        )


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
    axes.set_facecolor(MISSING)
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            if value is None:
                axes.text(j + 0.5, i + 0.5, "–", ha="center", va="center", color=INK)
                continue
            red, green, blue, _ = mesh.to_rgba(value)
            light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
            ink = "#010101" if light else "#fefefe"  # not INK: it stands on the shade, not on the page
            if written:
                axes.text(j + 0.5, i + 0.5, written(value), ha="center", va="center", color=ink, fontsize=7)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    _words(axes, found.columns, room, 0.5)
    axes.set_yticks([i + 0.5 for i in range(len(found.rows))], [_word(value) for value in found.rows])
    axes.invert_yaxis()
    axes.set_xlabel(found.column)
    axes.set_ylabel(found.row)
    return mesh


def _shades(name: str, low: float, high: float, log: bool) -> dict[str, Any]:
    from matplotlib.colors import LogNorm, Normalize

    if low == high:
        high = low + (abs(low) or 1.0) * 1e-6
    return {"cmap": name, "norm": (LogNorm if log else Normalize)(low, high)}


def _words(axes: "Axes", values: Sequence[Any], room: int, shift: float = 0.0) -> None:
    """Ticks that are words, turned where the axis has no room for so many letters."""
    words = [_word(value) for value in values]
    crowded = len(words) * (max(map(len, words)) + 1) > room
    turned: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axes.set_xticks([index + shift for index in range(len(words))], words, **turned)


def _ticks_at(axes: "Axes", values: Sequence[float], label: str) -> None:
    """The axis of a parameter with ticks at its own values, logarithmic where these are."""
    from matplotlib.ticker import NullLocator

    if values[0] > 0 and values[-1] / values[0] > 5:
        axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    kept = values if len(values) <= 6 else values[:: -(-len(values) // 6)]
    axes.set_xticks(kept, [_word(value) for value in kept])
    axes.set_xlabel(label)


def _log_if_wide(axes: "Axes", values: Sequence[float]) -> None:
    finite = [value for value in values if math.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) / min(finite) > 20:
        axes.set_yscale("log")
        # the band below the smallest mean would stretch a logarithmic axis down without end
        axes.set_ylim(bottom=min(finite) / 1.6)
    _plain(axes.yaxis)


def _plain(axis: Any) -> None:
    """Numbers as they are written in the tables, and not so many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = axis.get_view_interval()
    if axis.get_scale() == "log":
        decades = math.log10(high / low)
        subs = (1.0,) if decades > 3 else (1.0, 3.0) if decades > 1.2 else (1.0, 2.0, 5.0)
        axis.set_major_locator(LogLocator(subs=subs, numticks=8))
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _whole_numbers(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _word(value: Any) -> str:
    return re.sub(r"e([+-])0*", lambda found: f"e{found[1].strip('+')}", console.word(value))


def _short(value: float) -> str:
    """Three digits, such as 0.0123, 1230 and 1.2e5."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return _word(float(f"{value:.1e}"))

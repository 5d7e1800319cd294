"""How a report's figures look, and how they are written: as files, and as parts of a page.

Each rule has its own colour, line and marker in every figure; backpropagation, the control, has that of the text.
So has each layer its colour and line, the output layer that of the text. A figure is as wide as a column or, with
several panels, as a page of two columns. matplotlib is imported in functions only.
"""

import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpf.extras import need
from bpf.files import write_atomically
from bpf.report.tables import Band
from bpf.words import word as plain_word

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN, PAGE = 3.5, 7.16
"""Widths of figures in inches."""
MAKER = "bpf report"
DRAWN = re.compile(f".*{MAKER}".encode(), re.DOTALL)
"""How a file is known that holds a figure of a report."""
INK = "#000000"
MISSING = "#99999955"
WRITTEN = 8
"""More columns of a map than these have no room for numbers."""
LETTERS = 12
"""How many fit below a panel that is an inch wide."""

# Okabe and Ito 2008, without its yellow, which is not seen on white.
_FIXED = {"bp": INK, "dfa": "#0072B2", "drtp": "#D55E00", "ll-cce": "#009E73", "ll-mse": "#CC79A7"}
_OTHERS = ("#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (5, 1, 1, 1)), (0, (8, 2)))
_MARKERS = "osD^vPX*<>"
_LAYERS = ("#3a86d1", "#9a6fd0", "#d9598c", "#e07a2f")
"""From the first hidden layer to the last, and as light as can be told from white and from a dark page."""
DARK = {"#0072b2": "#4fa8e0", "#d55e00": "#f0803c", "#009e73": "#2fbf95", "#8c6d31": "#b9975a"}
"""Lighter colours for a dark page."""

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
            rule: {"color": colour, "linestyle": LINES[i % len(LINES)], "marker": _MARKERS[i % len(_MARKERS)]}
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


def styled(draw: "Callable[[], Figure]") -> "Figure":
    """Draw in the style of the report."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        return draw()


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as its name's ending says: on white for png, with nothing behind it for svg and pdf."""
    kind = path.suffix[1:]
    look = {"dpi": 300, "facecolor": "white"} if kind == "png" else {"transparent": True}
    write_atomically(path, lambda file: file.write(_bytes(figure, kind, **look)))


def inline_svg(figure: "Figure", name: str) -> str:
    """A figure as an element of a page: its text is text, black is the page's own colour, and no id is met twice.

    The colours of `DARK` are variables of the page, such as `--0072b2`.

    `name` must be unique in the page.
    """
    text = _bytes(figure, "svg", transparent=True).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r"\bid=\"", f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r"href=\"#", f'href="#{name}-', text)
    for colour in DARK:
        text = text.replace(colour, f"var(--{colour[1:]}, {colour})")
    text = text.replace(INK, "currentColor").replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    # matplotlib leaves out the fill of black text and paths, as black is what SVG would take
    text = re.sub(r"<svg [^>]*viewBox=\"([^\"]*)\"[^>]*>", r'<svg viewBox="\1" role="img" fill="currentColor">', text)
    return text.strip()


def _bytes(figure: "Figure", kind: str, **look: Any) -> bytes:
    import matplotlib

    told = {  # no date, so that the same numbers make the same files
        "svg": {"Date": None, "Creator": MAKER},
        "pdf": {"CreationDate": None, "Creator": MAKER},
        "png": {"Software": MAKER},
    }
    target = io.BytesIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "bpf"}):
        figure.savefig(target, format=kind, metadata=told[kind], **look)
    return target.getvalue()


def blank(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def one(height: float) -> "tuple[Figure, Axes]":
    figure = blank(COLUMN, height)
    return figure, figure.subplots()


def panels(count: int, height: float, most: int = 4) -> "tuple[Figure, list[Axes]]":
    """Up to `most` panels a line, each `height` inches high; a single one is as wide as a column."""
    lines = -(-count // most)
    columns = -(-count // lines)
    figure = blank(COLUMN if count == 1 else PAGE, height * lines + 0.3)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for spare in panels[count:]:
        spare.remove()
    return figure, panels[:count]


def layer(index: int | None, depth: int) -> dict[str, Any]:
    """How a layer is drawn: the hidden one `index` of `depth` at most, or the output layer where it is None."""
    from matplotlib.colors import LinearSegmentedColormap

    if index is None:
        return {"color": INK, "linestyle": "-", "linewidth": 1.0, "zorder": 1.9}  # below the others
    shades = LinearSegmentedColormap.from_list("layers", _LAYERS)
    return {"color": shades(index / max(1, depth - 1)), "linestyle": LINES[index % len(LINES)]}


def shade(axes: "Axes", band: Band, colour: Any, scale: float = 1.0) -> None:
    """Mean ± std; on a logarithmic axis down to its end where the std is larger than the mean."""
    if band.std is None:
        return
    bottom = axes.get_ylim()[0] if axes.get_yscale() == "log" else -math.inf
    ends = [(mean * scale, std * scale) for mean, std in zip(band.mean, band.std, strict=True)]
    low = [max(mean - std, bottom) for mean, std in ends]
    axes.fill_between(band.x, low, [mean + std for mean, std in ends], color=colour, alpha=0.18, linewidth=0)


def legend(figure: "Figure", *panels: "Axes") -> None:
    """Above the axes, so that it covers no data; each label once, in the order of the panels."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        fitting = max(1, int(72 * figure.get_figwidth() / (23 + 4.3 * max(map(len, handles)))))
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


def words(axes: "Axes", values: Sequence[Any], shift: float = 0.0) -> None:
    """Ticks that are words, turned where the axis has no room for them."""
    words = [word(value) for value in values]
    figure, place = axes.get_figure(root=True), axes.get_subplotspec()
    assert figure is not None
    assert place is not None
    inches = figure.get_figwidth() / place.get_gridspec().ncols
    crowded = (max(map(len, words)) + 1.5) * len(words) > LETTERS * inches
    turned: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axes.set_xticks([index + shift for index in range(len(words))], words, **turned)


def ticks_at(axes: "Axes", values: Sequence[float], label: str) -> None:
    """The axis of a parameter with ticks at its own values, logarithmic where these are."""
    from matplotlib.ticker import NullLocator

    if values[0] > 0 and values[-1] / values[0] > 5:
        axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    kept = values if len(values) <= 6 else values[:: -(-len(values) // 6)]
    axes.set_xticks(kept, [word(value) for value in kept])
    axes.set_xlabel(label)


def wide(values: Iterable[float]) -> bool:
    """Whether values are positive and more than a decade apart, so that only a logarithmic scale shows them all."""
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) / min(finite) > 10


def scale(axes: "Axes", log: bool, values: Iterable[float]) -> None:
    """A vertical axis for `values`, logarithmic or not."""
    if log:
        axes.set_yscale("log")
        # the band below the smallest mean would stretch a logarithmic axis down without end
        axes.set_ylim(bottom=min(value for value in values if math.isfinite(value)) / 1.3)
    plain(axes.yaxis)


def plain(axis: Any) -> None:
    """Numbers as they are written in the tables, and not so many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = axis.get_view_interval()
    if axis.get_scale() == "log":
        decades = math.log10(high / low)
        subs = (1.0,) if decades > 3 else (1.0, 3.0) if decades > 1.2 else (1.0, 2.0, 5.0)
        axis.set_major_locator(LogLocator(subs=subs, numticks=8))
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: "−" * bool(value < 0) + short(abs(value))))


def whole_numbers(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def word(value: Any) -> str:
    """A parameter's value as in the tables, but for `1e-5` in place of `1e-05`."""
    return _brief(plain_word(value))


def short(value: float, zeros: bool = False) -> str:
    """Three digits, such as 0.0123, 1230 and 1.2e5; with `zeros` 0.300 and not 0.3."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}" if zeros else f"{value:.3g}"
    return _brief(f"{value:.1e}".replace(".0e", "e"))


def _brief(text: str) -> str:
    return re.sub(r"(?<=\d)e([+-])0*", lambda found: f"e{found[1].strip('+')}", text)

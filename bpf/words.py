"""Numbers, times and parameters in words, as every table, page and message writes them."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

SHORT = {"batch_norm": "bn", "bw_init": "feedback", "activation": "act"}
MARKS = "▁▂▃▄▅▆▇█"


def describe(params: Mapping[str, Any]) -> str:
    """Parameters in one line, such as `arch=500 bn=yes lr=0.01`."""
    return " ".join(f"{SHORT.get(name, name)}={word(value)}" for name, value in params.items())


def word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


class Spread(Protocol):
    """A mean over executions, and their standard deviation if there are several."""

    @property
    def mean(self) -> float: ...
    @property
    def std(self) -> float | None: ...


def plus_minus(name: str, spread: Spread) -> str:
    """`0.123 ± 0.004`; errors are shown in percent."""
    is_error = name.endswith("error")
    scale, digits = (100, ".2f") if is_error else (1, ".4f" if 0.001 <= abs(spread.mean) < 1e5 else ".1e")
    deviation = f" ± {spread.std * scale:{digits}}" if spread.std is not None else ""
    return f"{spread.mean * scale:{digits}}{deviation}{' %' if is_error else ''}"


def duration(seconds: float) -> str:
    """`40 s`, `3 min`, `2 h 05 min`, `3 d 4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def sparkline(values: Sequence[float], width: int = 8) -> str:
    """A small curve, such as `█▅▃▂▁`, of the whole series: each mark is the last value of its part."""
    if len(values) < 2:
        return ""
    count = min(width, len(values))
    shown = [values[(i + 1) * len(values) // count - 1] for i in range(count)]
    low, high = min(shown), max(shown)
    return "".join(MARKS[round((value - low) / ((high - low) or 1) * (len(MARKS) - 1))] for value in shown)

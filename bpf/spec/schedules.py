"""Learning-rate schedules: the factor on every learning rate of an epoch."""

import math
import re

FORMS = "constant, cosine, linear, linear@EPOCH, or FACTOR@EPOCH-EPOCH-... such as 0.1@60-90"
_PATTERN = re.compile(
    r"(?P<name>constant|cosine|linear)|linear@(?P<start>[0-9]{1,7})"
    r"|(?P<factor>0?\.[0-9]{1,9}|0\.[0-9]{1,9}|1e-[0-9])@(?P<epochs>[0-9]{1,7}(-[0-9]{1,7})*)"
)


def check(schedule: str) -> str:
    """The schedule itself. Raises ValueError for one that is none, or whose epochs do not increase."""
    found = _PATTERN.fullmatch(schedule)
    epochs = [int(epoch) for epoch in (found["epochs"] or "").split("-") if epoch] if found else []
    if found is None or epochs != sorted(set(epochs)):
        raise ValueError(f"give {FORMS}, with a factor below 1 and epochs that increase")
    return schedule


def needs_end(schedule: str) -> bool:
    """Whether the number of epochs matters from the first one on, so that it must not grow."""
    return schedule == "cosine" or schedule.startswith("linear")


def factor(schedule: str, epoch: int, epochs: int) -> float:
    """The factor in `epoch`, counted from 0, of so many.

    `cosine` is (1 + cos(π epoch / epochs)) / 2 (Loshchilov & Hutter 2017, without restarts); `linear` falls to zero,
    from the start or after EPOCH epochs; FACTOR@EPOCHS multiplies by FACTOR after each of these. No factor is zero.
    """
    found = _PATTERN.fullmatch(schedule)
    assert found is not None, schedule
    if schedule == "cosine":
        return (1 + math.cos(math.pi * epoch / epochs)) / 2
    if schedule.startswith("linear"):
        start = int(found["start"] or 0)
        return 1.0 if epoch <= start else (epochs - epoch) / (epochs - start)
    if schedule == "constant":
        return 1.0
    return float(found["factor"]) ** sum(int(after) <= epoch for after in found["epochs"].split("-"))


def scaled(schedule: str, factor: float) -> str:
    """The same schedule for so many times the epochs; what falls together there becomes one step."""
    found = _PATTERN.fullmatch(schedule)
    assert found is not None, schedule
    if found["start"]:
        return f"linear@{round(int(found['start']) * factor)}"
    if found["epochs"]:
        moved = {max(1, round(int(epoch) * factor)) for epoch in found["epochs"].split("-")}
        return f"{found['factor']}@{'-'.join(map(str, sorted(moved)))}"
    return schedule

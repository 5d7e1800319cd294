"""The plugins that an experiment names, loaded and checked."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bpf.errors import UsageError
from bpf.registry import ALGORITHMS, TRACKERS, Registry

if TYPE_CHECKING:
    from bpf.algorithms import Algorithm
    from bpf.trackers import Tracker


def load_rules(names: Sequence[str]) -> "dict[str, type[Algorithm]]":
    """The learning rules of these names. Raises UsageError for one that is unknown, broken or not a rule."""
    from bpf.algorithms import Algorithm

    registry = Registry(ALGORITHMS)
    rules = {}
    for name in names:
        rule = registry.load(name)
        if not (isinstance(rule, type) and issubclass(rule, Algorithm)):
            raise UsageError(f"The algorithm {name!r} ({registry.describe(name).target}) is not a bpf Algorithm.")
        rules[name] = rule
    return rules


def load_trackers(names: Sequence[str]) -> "dict[str, Tracker]":
    registry = Registry(TRACKERS)
    return {name: registry.load(name)() for name in names}

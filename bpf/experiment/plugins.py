"""The plugins that an experiment names, loaded and checked."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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
        rules[name] = registry.load_class(name, Algorithm)
        if problem := _misdeclared(rules[name]) or _problem_of_options(rules[name].Options):
            raise registry.refusal(name, problem)
    return rules


def load_trackers(names: Sequence[str]) -> "dict[str, Tracker]":
    """The trackers of these names, made. Raises UsageError as `load_rules` does."""
    from bpf.trackers import Tracker

    registry = Registry(TRACKERS)
    trackers = {}
    for name in names:
        kind = registry.load_class(name, Tracker)
        try:
            trackers[name] = kind()
        except (Exception, SystemExit) as error:
            raise registry.refusal(name, f"{type(error).__name__}: {error}", "made") from error
    return trackers


def _misdeclared(rule: "type[Algorithm]") -> str:
    """Why what a rule says of itself cannot be used, or nothing."""
    from bpf.spec.fields import choices
    from bpf.spec.grid import TUNABLE

    kinds: dict[str, Any] = {"problem_types": choices("problem_type"), "unused_parameters": TUNABLE}
    for attribute, known in kinds.items():
        given = getattr(rule, attribute)
        if not (isinstance(given, set | frozenset) and given <= set(known)):
            return f"its {attribute} is {given!r}, and must be a set of some of {', '.join(known)}"
    if not rule.problem_types:
        return "its problem_types is empty, so that there is nothing that it can do"
    for attribute in ("needs_bounded_activation", "has_feedback", "feeds_target", "layerwise", "capturable"):
        if not isinstance(given := getattr(rule, attribute), bool):
            return f"its {attribute} is {given!r}, and must be True or False"
    for attribute in ("equation", "reference"):
        if not isinstance(given := getattr(rule, attribute), str):
            return f"its {attribute} is {given!r}, and must be a text"
    return ""


def _problem_of_options(model: Any) -> str:
    """Why a rule's options cannot be used, or nothing."""
    from pydantic import ValidationError

    from bpf.algorithms import Options

    if not (isinstance(model, type) and issubclass(model, Options)):
        return "its Options are no subclass of bpf.algorithms.Options"
    defaults = {name: field.get_default(call_default_factory=True) for name, field in model.model_fields.items()}
    for name, default in defaults.items():
        if not isinstance(default, bool | int | float | str):
            return f"its option {name} has no default that is a number or a word"
    try:
        model.model_validate(defaults)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        return f"its option {name} does not accept its own default {defaults.get(name)!r}: {first['msg']}"
    return ""

"""What a rule takes: problems, activations and initialisers that suit it, and its own options."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from bpf.errors import UsageError, did_you_mean
from bpf.spec.values import BOUNDED_ACTIVATIONS
from bpf.study.cells import Value

if TYPE_CHECKING:
    from bpf.algorithms import Algorithm


def check_problem(name: str, rule: "type[Algorithm]", problem_type: str) -> None:
    if problem_type not in rule.problem_types:
        able = " or ".join(sorted(rule.problem_types))
        raise UsageError(
            f"algorithm {name} with problem_type {problem_type}: {name} only does {able}. "
            f"Use problem_type {able}, or another rule (see `bpf algorithms`)."
        )


def unsuitable(name: str, rule: "type[Algorithm]", parameter: str, value: Value, allow: bool) -> str:
    """Why a rule cannot take a value of a parameter, or nothing."""
    bounded = " or ".join(sorted(BOUNDED_ACTIVATIONS))
    unbounded = parameter == "activation" and value not in BOUNDED_ACTIVATIONS
    if unbounded and rule.needs_bounded_activation and not allow:
        return (
            f"algorithm {name} with activation {value}: {name} diverges with an activation that is not bounded. "
            f"Use activation {bounded}, or --allow-unstable to try it all the same."
        )
    if parameter == "init" and value == "aligned" and not rule.has_feedback:
        return (
            f"algorithm {name} with init aligned: {name} has no feedback matrices to align with. "
            "Use another init, such as orthogonal."
        )
    return ""


def short_reason(name: str, parameter: str) -> str:
    if parameter == "activation":
        return f"{name} diverges unless the activation is bounded (--allow-unstable to include them)"
    return f"{name} has no feedback matrices to align with"


def check_option_names(given: Mapping[str, Any], rules: "Mapping[str, type[Algorithm]]") -> None:
    for name in given:
        if name not in rules:
            raise UsageError(
                f"Options are given for the rule {name!r}, which is not in algorithm.{did_you_mean(name, rules)}"
            )


def option_values(rule: "type[Algorithm]", name: str, given: Mapping[str, Any]) -> dict[str, list[Value]]:
    """Every option of a rule with its validated candidates, but for one that came `later` and has its default."""
    defaults = options(rule, name, {}).model_dump(mode="json")
    values: dict[str, list[Value]] = {option: [default] for option, default in defaults.items()}
    for option, raw in given.items():
        candidates = raw if isinstance(raw, list | tuple) else str(raw).split(",") if isinstance(raw, str) else [raw]
        each = [options(rule, name, {option: v}).model_dump(mode="json")[option] for v in candidates]
        if len(set(each)) < len(each):
            raise UsageError(f"{name}.{option}: {raw!r} is not accepted: a value is there more than once.")
        values[option] = each
    later = {o for o, field in rule.Options.model_fields.items() if field.json_schema_extra == {"later": True}}
    return {name: each for name, each in values.items() if name not in later or each != [defaults[name]]}


def options(rule: "type[Algorithm]", name: str, given: Mapping[str, Any]) -> BaseModel:
    try:
        return rule.Options.model_validate(dict(given))
    except ValidationError as error:
        problem = error.errors()[0]
        option = str(problem["loc"][0]) if problem["loc"] else ""
        if problem["type"] == "extra_forbidden":
            known = did_you_mean(option, rule.Options.model_fields) or f" {name} has no options."
            raise UsageError(f"Unknown option {name}.{option}.{known}") from None
        message = str(problem["msg"]).removeprefix("Value error, ").replace("Input should be", "it must be")
        raise UsageError(f"{name}.{option}: {problem['input']!r} is not accepted: {message}.") from None

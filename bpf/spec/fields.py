"""A spec's fields in words: validation with messages for people, choices, ranges, and the JSON schema."""

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from bpf.errors import UsageError, did_you_mean
from bpf.spec.grid import TUNABLE, GridSpec
from bpf.spec.run import RunSpec, Settings

SpecType = TypeVar("SpecType", bound=Settings)


def build(model: type[SpecType], values: Mapping[str, Any], naming: str = "field") -> SpecType:
    """Validate `values` into a spec.

    `naming` is how messages call a field: `field` (`batch_size`) or `option` (`--batch-size`).
    Raises UsageError with one line a problem.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise UsageError("\n".join(dict.fromkeys(_explain(model, e, naming) for e in error.errors()))) from None


def _explain(model: type[Settings], error: Any, naming: str) -> str:
    location = [str(part) for part in error["loc"] if not str(part).startswith(("function-", "tuple[", "literal["))]
    if not location:
        return str(error["ctx"]["error"])
    field = location[0]
    name = f"--{field.replace('_', '-')}" if naming == "option" else field
    if error["type"] == "extra_forbidden" and len(location) == 1:
        return f"Unknown field {field!r}.{did_you_mean(field, model.model_fields)}"
    if error["type"] == "missing" and len(location) == 1:
        return f"{name} is missing: {RunSpec.model_fields[field].description}"
    given = error["input"]
    if error["type"] == "literal_error":
        return f"{name}: {given!r} is not one of the choices.{did_you_mean(str(given), choices(field))}"
    message = str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "it must be")
    return f"{name}: {given!r} is not accepted: {message}{'' if message.endswith('.') else '.'}"


def choices(field: str) -> tuple[str, ...]:
    """The allowed words of a field, or nothing."""
    return _literals(RunSpec.model_fields[field].annotation)


def _literals(annotation: Any) -> tuple[str, ...]:
    if typing.get_origin(annotation) is Literal:
        return tuple(word for arg in typing.get_args(annotation) for word in (_literals(arg) or (str(arg),)))
    if isinstance(annotation, types.UnionType):
        return tuple(word for arg in typing.get_args(annotation) for word in _literals(arg))
    return ()


@dataclass(frozen=True)
class Limits:
    """The least and the largest number that a field takes, None if there is none; one may be excluded itself."""

    low: float | None = None
    high: float | None = None
    low_excluded: bool = False
    high_excluded: bool = False


def limits(model: type[BaseModel], field: str) -> Limits:
    """The allowed range of a numeric field."""
    found: dict[str, Any] = {}
    for item in _constraints(model.model_fields[field]):
        for name, end in (("ge", "low"), ("gt", "low"), ("le", "high"), ("lt", "high")):
            if (value := getattr(item, name, None)) is not None:
                found |= {end: value, f"{end}_excluded": name in ("gt", "lt")}
    return Limits(**found)


def bounds(model: type[BaseModel], field: str) -> str:
    """The allowed range of a numeric field in words, such as `0 to 1` or `above 0 to 10`, or nothing."""
    found = limits(model, field)
    if found.low is None:
        return ""
    low = f"{'above ' if found.low_excluded else ''}{found.low}"
    return f"{low} or more" if found.high is None else f"{low} to {'below ' if found.high_excluded else ''}{found.high}"


def _constraints(part: Any) -> Iterator[Any]:
    """Every constraint in a field or in the types its annotation is made of."""
    for item in [*getattr(part, "metadata", ()), *getattr(part, "__metadata__", ())]:
        yield from item.metadata if isinstance(item, FieldInfo) else [item]
    annotation = part.annotation if isinstance(part, FieldInfo) else part
    for argument in typing.get_args(annotation):
        if argument is not Literal and not isinstance(argument, str):
            yield from _constraints(argument)


def json_schema(model: type[Settings]) -> dict[str, Any]:
    """The JSON schema of spec files; in a grid's, a tunable field is one value or a list of them."""
    schema = model.model_json_schema()
    for name, described in schema["properties"].items():
        if name in RunSpec.model_fields:
            described["description"] = RunSpec.model_fields[name].description
        if model is GridSpec and name in TUNABLE:
            one = described.pop("items")
            many = {"type": described.pop("type"), "items": one, "minItems": 1}
            described.pop("minLength", None)
            described["anyOf"] = [{"const": "all"}, one, many] if name == "skew_type" else [one, many]
    return schema

"""What the tables of a study hold, checked whenever it is read: types, words that become file names, what must agree.

Whoever can write into a database can make anything of a cell; here it becomes a `Damage`, which says where.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypeVar

from pydantic import AfterValidator, FailFast, Field, TypeAdapter
from typing_extensions import TypedDict

from bpf.reading import Name, PathText, Word, check_plain, fitting, json_of, text_of
from bpf.spec.values import MAX_EPOCHS
from bpf.study.cells import Axis, Point, Row, Tally, Value

LARGEST_HISTORY = 2**28
MOST_EXECUTIONS = 1000
"""Bytes of a cell's curves, unpacked."""

T = TypeVar("T")
Plain = Annotated[str, AfterValidator(check_plain)]
Values = Annotated[list[float | None], FailFast()]
Epochs = Annotated[int, Field(ge=0, le=MAX_EPOCHS)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Scores(TypedDict):
    """On one part of the data; without an error in reconstruction."""

    loss: float | None
    error: Annotated[float, Field(ge=0, le=1)] | None


class Execution(TypedDict):
    """One training of a cell, without its curves."""

    seed: int
    status: Literal["running", "complete", "diverged"]
    epochs: Epochs
    best_epoch: Epochs
    objective: float | None
    train: Scores | None
    val: Scores | None
    test: Scores | None
    seconds: Seconds
    tracking_seconds: NotRequired[float]


class Result(TypedDict, total=False):
    """What came out of a cell so far."""

    executions: Annotated[list[Execution], FailFast()]
    seconds: Seconds
    added: bool
    device: str
    examples: int


class Curves(TypedDict):
    """An execution with its curves: a number per epoch in `history`, one per measurement in `tracked`."""

    seed: int
    status: str
    epochs: Epochs
    best_epoch: Epochs
    seconds: Seconds
    test: Scores | None
    history: dict[Plain, Values]
    tracked: NotRequired[dict[Plain, Values]]


class _Grid(TypedDict):
    """What is used of a grid's spec as it is. Whoever trains it checks all of it."""

    algorithm: list[Name]
    objective: str


class Settings(TypedDict, total=False):
    """What workers must know of an experiment."""

    kind: Literal["tune", "train"]
    spec: _Grid
    created: str
    files: PathText
    checkpoints: PathText
    former: list[Word]
    keep_checkpoints: bool


class _Spec(TypedDict):
    """What is used of a cell's spec before it is trained. Whoever trains it checks all of it."""

    epochs: Annotated[int, Field(ge=1, le=MAX_EPOCHS)]
    lr: NotRequired[float]


class _Owner(TypedDict):
    owner: Word
    machine: str
    lease: float


class _Experiment(TypedDict):
    name: Name
    schema_version: int


_ROW: TypeAdapter[Row] = TypeAdapter(Row)
_SPEC: TypeAdapter[_Spec] = TypeAdapter(_Spec)
_RESULT: TypeAdapter[Result] = TypeAdapter(Result)
_HISTORY: TypeAdapter[list[Curves]] = TypeAdapter(Annotated[list[Curves], FailFast()])
_PARAMS: TypeAdapter[dict[str, Value]] = TypeAdapter(dict[Plain, Plain | int | float | bool])
_AXES: TypeAdapter[list[Axis]] = TypeAdapter(list[Axis])
_TALLY: TypeAdapter[Tally] = TypeAdapter(Tally)
_SETTINGS: TypeAdapter[Settings] = TypeAdapter(Settings)
_OWNER: TypeAdapter[_Owner] = TypeAdapter(_Owner)
_NAME: TypeAdapter[str] = TypeAdapter(Name)
_NUMBER: TypeAdapter[float] = TypeAdapter(Annotated[float, Field(allow_inf_nan=False)])
_WORD: TypeAdapter[str] = TypeAdapter(Word)
_EXPERIMENT: TypeAdapter[_Experiment] = TypeAdapter(_Experiment)


class Damage(ValueError):
    """What is wrong with the content of a table, in words. `failing` and `explained` add which database it is in."""


def checked(adapter: TypeAdapter[T], value: Any, what: str) -> T:
    """A stored value as one of a type. Raises Damage."""
    try:
        return fitting(adapter, value)
    except ValueError as error:
        raise Damage(f"{what} is not what bpf has written ({error})") from error


def json(text: Any) -> Any:
    """The value of a column that holds JSON. Raises Damage."""
    if not isinstance(text, str | bytes):
        raise Damage("a column that holds JSON has none")
    try:
        return json_of(text)
    except ValueError as error:
        raise Damage(f"a column that holds JSON has none ({error})") from error


def unpacked(content: Any) -> Any:
    """The value of a column that holds compressed JSON, of at most `LARGEST_HISTORY` bytes. Raises Damage."""
    unpacking = zlib.decompressobj()
    try:
        text = unpacking.decompress(content, LARGEST_HISTORY)
    except (zlib.error, TypeError) as error:
        raise Damage(f"a history cannot be unpacked ({error})") from error
    if not unpacking.eof:
        raise Damage("a history is cut short or too large")
    return json(text)


def row(record: Mapping[Any, Any]) -> Row:
    """A cell as it stands in the plan."""
    what = f"the cell {record['key']!r}"
    found = checked(_ROW, dict(record), what)
    checked(_SPEC, found.spec, f"the spec of {what}")
    for name, given in found.params.items():
        if found.spec.get(name, given) != given:
            raise Damage(f"{what} has {name} {given!r}, and in its spec {found.spec[name]!r}")
    checked(_PARAMS, found.params, f"what makes {what}")
    if found.result is not None:
        checked(_RESULT, found.result, f"the result of {what}")
    if found.state in ("complete", "diverged"):
        values = [one["objective"] for one in (found.result or {}).get("executions", ())]
        late = any(one["best_epoch"] > one["epochs"] for one in (found.result or {}).get("executions", ()))
        whole = not late and all(value is not None and math.isfinite(value) for value in (found.value, *values))
        if not values or (found.state == "complete" and not whole):
            raise Damage(
                f"the result of {what}, which is {found.state}, has no value of an epoch for each of its executions"
            )
    _check_result(found, what)
    return found


def _check_result(found: Row, what: str) -> None:
    """Raise Damage for results that contradict themselves."""
    executions = (found.result or {}).get("executions", [])
    if found.state not in ("complete", "diverged"):
        return
    if len({one["seed"] for one in executions}) < len(executions):
        raise Damage(f"the result of {what} has a seed twice")
    statuses = {one["status"] for one in executions}
    if (found.state == "complete") != (statuses == {"complete"}):
        raise Damage(f"the result of {what}, which is {found.state}, has other executions")
    if found.state == "complete":
        values = [one["objective"] for one in executions]
        if not math.isclose(found.value or 0.0, math.fsum(values) / len(values), rel_tol=1e-9, abs_tol=1e-12):
            raise Damage(f"the value of {what} is not the mean of its executions")


def alike(found: list[Row]) -> list[Row]:
    """Cells of which those of one rule have the same parameters. Raises Damage for others."""
    first: dict[str, Row] = {}
    for one in found:
        if first.setdefault(one.rule, one).params.keys() != one.params.keys():
            raise Damage(f"the cell {one.key!r} has other parameters than others of {one.rule!r}")
    return found


def point(params: Any, names: Sequence[str], key: str) -> Point:
    """Where a cell lies in the grid of its rule, whose parameters have these names."""
    checked(_PARAMS, params, f"what makes the cell {key!r}")
    if set(params) != set(names):
        raise Damage(f"the cell {key!r} has other parameters than the grid of its rule")
    return tuple(params[name] for name in names)


def axes(value: Any, rule: str) -> list[Axis]:
    return checked(_AXES, value, f"the grid of {rule!r}")


def word(text: Any) -> str:
    """What bpf makes up itself, such as a key: it becomes a part of a path. Raises Damage."""
    return checked(_WORD, text, "a key or a name")


def rule(name: Any) -> str:
    return checked(_NAME, name, "the name of a rule")


def value(number: Any) -> float:
    """The value of a complete cell."""
    return checked(_NUMBER, number, "the value of a cell")


def tally(record: Mapping[Any, Any]) -> Tally:
    return checked(_TALLY, dict(record), "the state of a cell")


def history(value: Any, key: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or len(value) > MOST_EXECUTIONS:
        raise Damage(f"the history of the cell {key!r} is no list of executions")
    checked(_HISTORY, value, f"the history of the cell {key!r}")
    for record in value:
        if any(len(values) > record["epochs"] for values in record["history"].values()):
            raise Damage(f"the history of the cell {key!r} has more entries than epochs")
        lengths = {len(values) for values in record.get("tracked", {}).values()}
        if len(lengths) > 1:
            raise Damage(f"the measurements of the cell {key!r} are not of one length")
    found: list[dict[str, Any]] = value
    return found


def settings(value: Any) -> dict[str, Any]:
    checked(_SETTINGS, value, "what the study says of its experiment")
    return dict(value)


def owner(record: Mapping[Any, Any]) -> dict[str, Any]:
    found: Any = checked(_OWNER, dict(record), "what the study says of a worker")
    return dict(found)


def experiment(record: Mapping[Any, Any]) -> tuple[str, int]:
    """The name of an experiment and the version of its tables."""
    found = checked(_EXPERIMENT, dict(record), "the list of experiments")
    return found["name"], found["schema_version"]


def older_history(path: Path) -> Any:
    """What bpf 0.1 kept of a cell in a file. Raises Damage."""
    try:
        return json_of(text_of(path))
    except (OSError, ValueError) as error:
        raise Damage(f"{path} cannot be read ({error})") from error

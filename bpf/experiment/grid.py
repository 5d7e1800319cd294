"""From a grid spec to its cells: per learning rule, the Cartesian product of what means something to it."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bpf.errors import UsageError
from bpf.experiment.suiting import check_option_names, check_problem, option_values, options, short_reason, unsuitable
from bpf.spec.fields import choices
from bpf.spec.grid import REGULARISATION, TUNABLE, GridSpec
from bpf.spec.rows import Row
from bpf.spec.run import NEWER, RunSpec, digest, work
from bpf.study.cells import Axis, Cell, Value

if TYPE_CHECKING:
    from bpf.algorithms import Algorithm

MAX_CELLS = 1_000_000
SKEW = "skew"
ROW = "row"
PER_RUN = frozenset({"lr", "bw_init", "dropout", "weight_decay", "seed"})
"""What the runs of a cohort may differ in."""
NO_SETUP = frozenset({"lr", *REGULARISATION})
"""What a learning rate that is handed over does not depend on; a cell's other parameters are its setup."""

Rules = Mapping[str, "type[Algorithm]"]
Refused = tuple[str, int, str]
"""A parameter, how many of its values were refused, and why."""


@dataclass(frozen=True)
class LeftOut:
    """Cells that were not planned, and why."""

    rule: str
    cells: int
    reason: str


class Holes(UsageError):
    """Setups of a rule that no learning rate was handed over for, and that cannot be left out."""

    def __init__(self, rule: str, missing: Sequence[Mapping[str, Value]]) -> None:
        super().__init__(
            f"A grid must be whole, and lr_from has no learning rate for {len(missing)} of the setups of {rule}, "
            f"such as {words(rule, missing[0])}. Add what is missing, or shorten lists."
        )


@dataclass
class Grid:
    """The cells in plan order, each rule's axes, and what was left out."""

    cells: list[Cell] = field(default_factory=list)
    axes: dict[str, list[Axis]] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)


def check_run(run: RunSpec, rule: "type[Algorithm]") -> None:
    """Raise UsageError if `rule` cannot do `run`, saying which fields and what would work."""
    check_problem(run.algorithm, rule, run.problem_type)
    for name in ("activation", "init"):
        reason = unsuitable(run.algorithm, rule, name, getattr(run, name), run.allow_unstable)
        if reason:
            raise UsageError(reason)
    check_option_names(run.options, {run.algorithm: rule})
    options(rule, run.algorithm, run.rule_options())


def expand(grid: GridSpec, rules: Rules) -> Grid:
    """Every cell of every rule in `grid.algorithm`.

    Raises UsageError for a rule that cannot do the problem, for a rule with no possible cell, for unknown rule
    options, for more than a million cells, for learning rates that must be taken from an earlier phase first, and
    (`Holes`) if they leave holes in the grid.
    """
    return _rows(grid, rules) if grid.rows else _expand(grid, rules)


def _rows(grid: GridSpec, rules: Rules) -> Grid:
    """The cells of all rows. Their only parameter is `row`: its name, with what it tunes, such as `dfa: lr=0.01`."""
    plan = Grid()
    keys: dict[str, str] = {}
    names: dict[str, list[Value]] = {}
    for name, each in grid.grids().items():
        try:
            part = _expand(each, rules)
        except UsageError as error:
            raise UsageError(f"Row {name}: {error}") from None
        [(rule, axes)] = part.axes.items()
        tuned = [axis.name for axis in axes if len(axis.values) > 1]
        for cell in part.cells:
            values = " ".join(f"{parameter}={_word(cell.params[parameter])}" for parameter in tuned)
            row = f"{name}: {values}" if values else name
            if cell.key in keys:
                raise UsageError(f"The rows {keys[cell.key]!r} and {row!r} are the same settings. Leave one out.")
            keys[cell.key] = row
            names.setdefault(rule, []).append(row)
            plan.cells.append(replace(cell, params={ROW: row}))
        plan.left_out += part.left_out
    plan.axes |= {rule: [Axis(ROW, values)] for rule, values in names.items()}
    return plan


def row_of(params: Mapping[str, Value]) -> tuple[str, str]:
    """The row that a cell belongs to, and what it tunes in words."""
    name, _, tuned = str(params.get(ROW, "")).partition(": ")
    return name, tuned


def _expand(grid: GridSpec, rules: Rules) -> Grid:
    _check_rates(grid)
    check_option_names(grid.options, rules)
    plan = Grid()
    for name in grid.algorithm:
        rule = rules[name]
        check_problem(name, rule, grid.problem_type)
        axes, left_out = _axes(grid, name, rule)
        total = math.prod(len(axis.values) for axis in axes)
        if total + len(plan.cells) > MAX_CELLS:
            raise UsageError(f"The grid has more than {MAX_CELLS:,} cells; fix some parameters or shorten lists.")
        plan.axes[name] = axes
        plan.left_out += left_out
        plan.cells += _cells(grid, name, rule, axes)
    return plan


def resolve_options(grid: GridSpec, rules: Rules) -> GridSpec:
    """The same grid with every option of its rules written out, defaults too, each as a list of validated values.

    Raises UsageError as `expand` does for options and missing learning rates.
    """
    if grid.rows:
        rows = {name: _resolved_row(row, resolve_options(grid.row(name), rules)) for name, row in grid.rows.items()}
        return grid.model_copy(update={"rows": rows, "options": {}})
    _check_rates(grid)
    check_option_names(grid.options, rules)
    values = {name: option_values(rules[name], name, grid.options.get(name, {})) for name in grid.algorithm}
    return grid.model_copy(update={"options": {name: options for name, options in values.items() if options}})


def _resolved_row(row: Row, grid: GridSpec) -> Row:
    return row.model_copy(update={"settings": {**row.settings, **({"options": grid.options} if grid.options else {})}})


def setup(params: Mapping[str, Value]) -> dict[str, Value]:
    """A cell's parameters without the learning rate and what regularises."""
    return {name: value for name, value in params.items() if name not in NO_SETUP}


def setups(grid: GridSpec, rules: Rules) -> Iterator[tuple[str, dict[str, Value]]]:
    """Each rule's setups that a learning rate is needed for, in plan order, whether there is one or not."""
    for name in grid.algorithm:
        values, _ = _values(grid, name, rules[name])
        if "lr" in values:
            yield from ((name, params) for params in _points({n: v for n, v in values.items() if n not in NO_SETUP}))


def words(rule: str, params: Mapping[str, Value]) -> str:
    """A setup in one line, such as `dfa arch=500 batch_norm=false`."""
    return " ".join([rule, *(f"{name}={_word(value)}" for name, value in params.items())])


def execution(run: RunSpec, number: int) -> RunSpec:
    """The spec of a cell's execution, which differs in its seed."""
    return run.model_copy(update={"seed": run.seed + number})


def as_grid(run: RunSpec) -> GridSpec:
    """The grid of one cell and one execution that is this run."""
    values = run.model_dump(exclude_none=True)
    return GridSpec.model_validate({**values, "executions_per_trial": 1})


def _axes(grid: GridSpec, name: str, rule: "type[Algorithm]") -> tuple[list[Axis], list[LeftOut]]:
    values, refused = _values(grid, name, rule)
    if grid.lr_from and "lr" in values:
        del values["lr"]
        refused += _without_rate(grid, name, values)
    sizes = {parameter: len(kept) for parameter, kept in values.items()}
    left_out = []
    for parameter, count, reason in refused:
        left_out.append(LeftOut(name, count * math.prod(sizes.values()) // sizes[parameter], reason))
        sizes[parameter] += count  # so that a cell that is refused twice is counted once
    return [_axis(parameter, kept) for parameter, kept in values.items()], left_out


def _values(grid: GridSpec, name: str, rule: "type[Algorithm]") -> tuple[dict[str, list[Value]], list[Refused]]:
    """The values of each parameter of a rule, and how many of which were refused and why."""
    values: dict[str, list[Value]] = {}
    refused: list[Refused] = []
    for parameter in TUNABLE:
        if parameter in ("algorithm", "imbalance_factor", *rule.unused_parameters):
            continue
        if parameter == "skew_type":
            values[SKEW] = list(_skews(grid))
            continue
        given = list(getattr(grid, parameter))
        if parameter in NEWER and given == [RunSpec.model_fields[parameter].default]:
            continue
        reasons = {v: unsuitable(name, rule, parameter, v, grid.allow_unstable) for v in given}
        values[parameter] = [v for v in given if not reasons[v]]
        dropped = [v for v in given if reasons[v]]
        if dropped and not values[parameter]:
            raise UsageError(f"Nothing is left of the grid of {name}: {reasons[dropped[0]]}")
        if dropped:
            words = ", ".join(map(str, dropped))
            refused.append((parameter, len(dropped), f"{parameter} {words}: {short_reason(name, parameter)}"))
    for option, candidates in option_values(rule, name, grid.options.get(name, {})).items():
        values[f"{name}.{option}"] = candidates
    return values, refused


def _without_rate(grid: GridSpec, name: str, values: dict[str, list[Value]]) -> Iterator[Refused]:
    """Take the values out of `values` that no setup with a learning rate has.

    Raises Holes if others without one are left: which of the setups that have one to give up is the user's choice.
    """
    rates = _rates(grid, name)
    names = [parameter for parameter in values if parameter not in NO_SETUP]
    asked = list(_points({parameter: values[parameter] for parameter in names}))
    having = [params for params in asked if _mark(params) in rates]
    if not having:
        raise Holes(name, asked)
    for parameter in names:
        used = {params[parameter] for params in having}
        dropped = [value for value in values[parameter] if value not in used]
        if dropped:
            values[parameter] = [value for value in values[parameter] if value in used]
            listed = ", ".join(map(_word, dropped))
            yield parameter, len(dropped), f"{parameter} {listed}: no learning rate was handed over"
    left = _points({parameter: values[parameter] for parameter in names})
    missing = [params for params in left if _mark(params) not in rates]
    if missing:
        raise Holes(name, missing)


def _rates(grid: GridSpec, name: str) -> dict[frozenset[Any], float]:
    return {_mark(rate.params): rate.lr for rate in grid.lr_from if rate.algorithm == name}


def _mark(params: Mapping[str, Any]) -> frozenset[Any]:
    return frozenset(params.items())


def _points(values: Mapping[str, Sequence[Value]]) -> Iterator[dict[str, Value]]:
    return (dict(zip(values, point, strict=True)) for point in itertools.product(*values.values()))


def _word(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _axis(name: str, values: Sequence[Value]) -> Axis:
    """Words that are all known are declared up front, and numbers get wide ranges, so that a grid can grow."""
    if name == "lr":
        return Axis(name, values, low=1e-12, high=10.0, log=True)
    if name in ("weight_decay", "dropout"):
        return Axis(name, values, low=0.0, high=1.0)
    if name == "batch_size":
        return Axis(name, values, low=1, high=1_000_000)
    if name == "batch_norm":
        return Axis(name, values, choices=[False, True])
    known = choices(name) if name in RunSpec.model_fields else ()
    return Axis(name, values, choices=list(known) or None)


def _skews(grid: GridSpec) -> Iterator[str]:
    """Skew type and factor are one axis, as no skew has no factor: `none`, `step:10`, `long_tailed:100`."""
    for skew in grid.skew_type:
        if skew == "none":
            yield skew
        else:
            yield from (f"{skew}:{str(factor).removesuffix('.0')}" for factor in grid.imbalance_factor)


def _cells(grid: GridSpec, name: str, rule: "type[Algorithm]", axes: Sequence[Axis]) -> Iterator[Cell]:
    """The cells of one rule. Those that may be stacked share one validation, as they differ in `PER_RUN` only.

    The grid has validated these values, and checked the only one that must agree with other fields, dropout.
    """
    shared = grid.model_dump(exclude={*TUNABLE, "executions_per_trial", "options", "lr_from"}) | {"algorithm": name}
    rates = _rates(grid, name) if "lr" not in rule.unused_parameters else {}
    alike: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {}
    for params in _points({axis.name: axis.values for axis in axes}):
        own = {parameter: value for parameter, value in params.items() if parameter in PER_RUN}
        if rates:
            own["lr"] = rates[_mark(setup(params))]
        rest = repr([value for parameter, value in params.items() if parameter not in PER_RUN])
        if rest not in alike:
            run = RunSpec.model_validate(shared | run_fields(name, params))
            identity = run.identity(rule.unused_parameters)
            structure = digest({key: value for key, value in identity.items() if key not in PER_RUN})
            alike[rest] = identity, structure, run.model_dump(mode="json")
        identity, structure, spec = alike[rest]
        yield Cell(digest(identity | own), name, structure, params, spec | own, cost=work(spec))


def run_fields(name: str, params: Mapping[str, Value]) -> dict[str, Any]:
    """A rule's parameters as the fields of a run spec."""
    fields: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for parameter, value in params.items():
        if parameter == SKEW:
            skew, _, factor = str(value).partition(":")
            fields["skew_type"] = skew
            if factor:
                fields["imbalance_factor"] = float(factor)
        elif parameter.startswith(f"{name}."):
            options[parameter.removeprefix(f"{name}.")] = value
        else:
            fields[parameter] = value
    return fields | ({"options": {name: options}} if options else {})


def _check_rates(grid: GridSpec) -> None:
    if grid.awaits_rates:
        raise UsageError(
            f"objective {grid.objective} without lr: val_* objectives tune regularisation and take the learning rate "
            "of each setup from an earlier phase. First run the same command with --objective loss and without "
            "--dropout, then this one with --lr-from DIR, where DIR is the directory of that experiment; or give --lr."
        )

"""A plan that grows: more values, more epochs, more executions, while nothing that is finished is trained again."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa

from bpf.errors import UsageError
from bpf.study import plan, schema
from bpf.study.cells import Axis, Cell
from bpf.study.plan import study_name
from bpf.study.trials import Trials


@dataclass(frozen=True)
class Growth:
    """What grows in one experiment, all in the transaction of `connection`."""

    connection: sa.Connection
    experiment: str
    trials: Trials

    def extend(self, rule: str, wanted: Sequence[Axis]) -> None:
        """Store the axes of a rule, and let Optuna's trials know what they add to the ones before."""
        study_id, before = plan.axes(self.connection, self.experiment).get(rule, (None, list(wanted)))
        if {axis.name for axis in before} != {axis.name for axis in wanted}:
            names = [", ".join(sorted(axis.name for axis in axes)) or "none" for axes in (before, wanted)]
            raise UsageError(
                f"The parameters of {rule!r} are {names[0]} in this experiment, not {names[1]}; start a new experiment."
            )
        added = {axis.name: axis for axis in wanted}
        after = [axis.extended(added[axis.name]) for axis in before]
        where = {"experiment": self.experiment, "rule": rule}
        if study_id is None:
            study_id = self.trials.new_study(self.connection, study_name(self.experiment, rule))
            record = {**where, "study_id": study_id, "axes": [asdict(axis) for axis in after]}
            self.connection.execute(sa.insert(schema.rules).values(record))
        elif after != before:
            change = sa.update(schema.rules).where(*(schema.rules.c[name] == where[name] for name in where))
            self.connection.execute(change.values(axes=[asdict(axis) for axis in after]))
            self.trials.extend(self.connection, study_id, before, after)

    def lengthen(self, reopened: Mapping[str, Cell]) -> None:
        """Make cells those of longer runs. The complete ones go on from the checkpoint of their cohort."""
        going_on = []
        for row in plan.rows(self.connection, self.experiment):
            if row.key not in reopened:
                continue
            change: dict[str, Any] = {k: v for k, v in vars(reopened[row.key]).items() if k not in ("rule", "params")}
            if row.state == "complete" and row.ran_to_the_end:
                change |= {"state": "interrupted", "value": None, "result": None, "seconds": None}
                going_on.append(row.trial_id)
            plan.update(self.connection, self.experiment, {"key": row.key}, **change)
            plan.rename_history(self.connection, self.experiment, row.key, reopened[row.key].key)
        self.trials.reopen(self.connection, [trial_id for trial_id in going_on if trial_id is not None])

    def add_executions(self, executions: int) -> None:
        """Open the complete cells that have fewer executions; they keep the results of those they have."""
        short = [row for row in plan.rows(self.connection, self.experiment, state="complete") if row.done < executions]
        for row in short:
            blank = {"state": "pending", "cohort": None, "value": None, "reached": 0}
            plan.update(self.connection, self.experiment, {"key": row.key}, **blank)
        self.trials.reopen(self.connection, [row.trial_id for row in short if row.trial_id is not None])

    def check_full(self, rule: str) -> None:
        """GridSampler knows only whole grids; one with holes would never be exhausted."""
        _, axes = plan.axes(self.connection, self.experiment)[rule]
        space = {axis.name: list(axis.values) for axis in axes}
        points = plan.points(self.connection, self.experiment, rule, sorted(space))
        whole = set(itertools.product(*(space[name] for name in sorted(space))))
        if len(points) != len(whole) or set(points) != whole:
            raise UsageError(
                f"The grid of {rule!r} must be whole: its values make {len(whole)} points, but {len(points)} "
                f"cells at {len(whole & set(points))} of them are planned. Give each parameter all its "
                "values, the earlier ones too, and leave the fixed settings as they were."
            )

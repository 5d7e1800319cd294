"""Experiments whose results are invented: everything is stored as a worker does it, and nothing is trained."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from bpf.api import open_tune
from bpf.experiment.directory import Experiment, Place
from bpf.spec.grid import GridSpec
from bpf.study.cells import Finished, Row
from bpf.study.owner import Owner
from bpf.workers.claims import outcome

Invent = Callable[[Row, int], dict[str, Any]]
"""The record of one execution, which is counted from 0, with its history."""


def planned(directory: Path, place: Place = Place(), **fields: Any) -> Experiment:  # noqa: B008 - it is frozen
    """An experiment on digits with nothing but its plan: if not said otherwise, one cell with one execution."""
    given = {"dataset": "digits", "algorithm": "dfa", "arch": "8", "activation": "tanh", "batch_norm": False}
    given |= {"bw_init": "ortho", "lr": 0.1, "epochs": 3, "executions_per_trial": 1}
    experiment = open_tune(directory, GridSpec.model_validate(given | fields), directory.parent / "data", place)
    experiment.save(["bpf", "tune"])
    study, _ = experiment.plan()
    study.close()
    return experiment


def finished(directory: Path, invent: Invent, place: Place = Place(), **fields: Any) -> Experiment:  # noqa: B008
    """An experiment in which every cell is finished."""
    experiment = planned(directory, place, **fields)
    with closing(experiment.open_study()) as study, Owner(study.locks, {}) as owner:
        while claim := study.claim(owner, lambda row: 100):
            for row in claim.rows:
                records = [invent(row, number) for number in range(experiment.grid.executions_per_trial)]
                executions = [{k: v for k, v in r.items() if k not in ("history", "tracked")} for r in records]
                state, value, result = outcome(executions)
                study.finish(claim, Finished(row.key, value, state, result, records))
    return experiment


def record(
    number: int, losses: list[float | None], tracked: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """An execution's record with these losses as all of its scores."""
    known = [loss for loss in losses if loss is not None]
    complete = len(known) == len(losses)
    return {
        "seed": number,
        "status": "complete" if complete else "diverged",
        "epochs": len(losses),
        "best_epoch": losses.index(min(known)) + 1,
        "objective": min(known) if complete else None,
        "train": None,
        "val": None,
        "test": {"loss": 2.0 * min(known), "error": 0.25} if complete else None,
        "seconds": 1.5,
        "history": {"loss": losses, "error": [None if loss is None else loss / 10 for loss in losses]},
        "tracked": tracked or {},
        **more,
    }


RECORD = record(0, [0.5])
RESULT = outcome([{name: value for name, value in RECORD.items() if name not in ("history", "tracked")}])[2]
"""What came out of some cell: for tests of what happens to it, and not of what it says."""
DIVERGED = RESULT | {"executions": [RESULT["executions"][0] | {"status": "diverged", "objective": None, "test": None}]}


def result(value: float, **more: Any) -> dict[str, Any]:
    """What came out of a cell with this value."""
    return RESULT | {"executions": [RESULT["executions"][0] | {"objective": value}]} | more


IN_SCRIPTS = f"""
from bpf.study.cells import Finished

RESULT, DIVERGED, RECORD = {RESULT!r}, {DIVERGED!r}, {RECORD!r}


def result(value, **more):
    return RESULT | {{"executions": [RESULT["executions"][0] | {{"objective": value}}]}} | more


"""
"""The same for a program that a test starts."""

"""How an experiment stands and what came out of it, as plain values. Imports neither torch nor Optuna."""

import datetime
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError, ValidatorFunctionWrapHandler, field_validator

from bpf.errors import RunError, UsageError, did_you_mean
from bpf.experiment.directory import Experiment
from bpf.experiment.further import Further, further
from bpf.experiment.grid import MAX_CELLS
from bpf.study.cells import OPEN, STATES, Row, Tally
from bpf.study.holder import Progress, Said
from bpf.study.ranking import Ranked, rank, winners
from bpf.study.ranking import best_per as ranking_per
from bpf.study.view import StudyView


def rows(experiment: Experiment) -> list[Row]:
    """Every cell of the experiment, in plan order."""
    with closing(experiment.read_study()) as study:
        return study.rows()


def varying(experiment: Experiment) -> frozenset[str]:
    """The parameters with more than one value."""
    with closing(experiment.read_study()) as study:
        return study.varying()


def history(experiment: Experiment, key: str) -> list[dict[str, Any]]:
    """A cell's executions with their histories: one number per epoch for each measurement."""
    with closing(experiment.read_study()) as study:
        return study.history(key) or []


def status(experiment: Experiment) -> dict[str, Any]:
    """Cells by state and trouble, who works on them and how far each is, seconds spent, and seconds left.

    The time left is that of the cohorts in training at their own pace, and of the others at the pace of all that was
    trained so far, shared by the workers that are alive. `throughput` is in examples a second, `device_hours` are those
    of all workers there ever were. `starting` says since when the experiment is, if it is.
    """
    held = experiment.held_since()
    starting = None if held is None else _utc(held)
    try:
        tallies, workers, spent = _at_work(experiment)
    except UsageError:
        if starting is None:
            raise
        tallies, workers, spent = ([], [], None) if experiment.is_unplanned() else _at_work(experiment)
    counts = dict.fromkeys(STATES, 0)
    causes: dict[str, dict[str, int]] = {}
    for tally in tallies:
        counts[tally.state] += tally.count
        if tally.cause is not None:
            by_state = causes.setdefault(tally.cause, {})
            by_state[tally.state] = by_state.get(tally.state, 0) + tally.count
    if workers or (tallies and not counts_open(counts)):
        starting = None
    finished = not (starting or counts_open(counts))
    eta = 0.0 if finished else _time_left(tallies, [worker.facts.at for worker in workers])
    return {
        "experiment": str(experiment.directory),
        "cells": {"total": sum(counts.values()), **counts},
        "causes": causes,
        "workers": [worker.as_json() for worker in workers],
        "nodes": _nodes(workers),
        "throughput": _throughput(workers),
        "dashboard": next((worker.facts.dashboard for worker in workers if worker.facts.dashboard), None),
        "device_hours": None if spent is None else round(spent / 3600, 6),
        "elapsed_seconds": round(sum(tally.seconds for tally in tallies), 3),
        "eta_seconds": None if eta is None else round(eta, 3),
        "starting": starting,
    }


def _at_work(experiment: Experiment) -> "tuple[list[Tally], list[_Worker], float | None]":
    """The cells, the workers whose records can be read, and the device-seconds of all there ever were."""
    with closing(experiment.read_study()) as study:
        tallies, workers = study.tally(), []
        for record in study.workers():
            with suppress(ValidationError):
                workers.append(_Worker.model_validate(record))
        return tallies, workers, study.spent()


def _nodes(workers: "Sequence[_Worker]") -> list[dict[str, Any]]:
    """The nodes of a cluster, or the hosts, on which there are workers, by name; those that say none are at the end."""
    found: dict[str | None, list[_Worker]] = {}
    for worker in workers:
        found.setdefault(worker.facts.node or worker.facts.host, []).append(worker)
    return [
        {
            "name": name,
            "workers": len(there),
            "devices": sorted({worker.facts.device for worker in there if worker.facts.device}),
            "throughput": _throughput(there),
        }
        for name, there in sorted(found.items(), key=lambda pair: (pair[0] is None, pair[0] or ""))
    ]


def _throughput(workers: "Sequence[_Worker]") -> float:
    return round(sum(worker.facts.at.speed for worker in workers if worker.facts.at), 3)


def _time_left(tallies: Sequence[Tally], at_work: Sequence[Progress | None]) -> float | None:
    """Seconds that the open cells will take; None while nothing is known of any pace."""
    known = [at for at in at_work if at is not None and at.left is not None]
    done = sum(tally.cost for tally in tallies if tally.seconds) + sum(at.trained for at in known)
    spent = sum(tally.seconds for tally in tallies) + sum(at.seconds for at in known)
    if not done:
        return None
    waiting = sum(tally.cost for tally in tallies if tally.state in OPEN) - sum(at.cost for at in known)
    begun = [at.left or 0.0 for at in known]
    return max((sum(begun) + max(0.0, waiting) * spent / done) / max(1, len(at_work)), *begun, 0.0)


class _Facts(BaseModel):
    """What a worker says of itself; what does not fit is left out."""

    host: Said | None = None
    node: Said | None = None
    device: Said | None = None
    bpf: Said | None = None
    torch: Said | None = None
    dashboard: Annotated[str, Field(pattern=r"^[\w.-]+:\d{1,5}$", max_length=300)] | None = None
    at: Progress | None = None

    @field_validator("*", mode="wrap")
    @classmethod
    def _or_none(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            return check(value)
        except ValidationError:
            return None


class _Worker(BaseModel):
    """A worker's record, which a damaged database may hold anything in."""

    pid: int
    began: float = Field(ge=0, le=1e11)
    facts: _Facts

    @field_validator("facts", mode="before")
    @classmethod
    def _or_nothing(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else {}

    def as_json(self) -> dict[str, Any]:
        said = self.facts.model_dump(exclude={"at", "dashboard"}, exclude_none=True)
        at = self.facts.at
        return {"pid": self.pid, **said, "since": _utc(self.began), "progress": None if at is None else at.as_json()}


def counts_open(counts: dict[str, int]) -> int:
    return sum(counts[state] for state in OPEN)


def provenance(experiment: Experiment) -> dict[str, Any]:
    """How an experiment was made: the resolved spec and each start with its command, versions, git and hardware."""
    return {
        "experiment": str(experiment.directory),
        "name": experiment.name,
        "created": experiment.created,
        "storage": experiment.database.public,
        "checkpoints": experiment.checkpoints or str(experiment.files),
        "data_dir": str(experiment.data_dir),
        "spec": experiment.grid.model_dump(mode="json"),
        "sessions": experiment.sessions(),
    }


def best(experiment: Experiment, top: int = MAX_CELLS, only: Sequence[str] = ()) -> list[Ranked]:
    """The complete cells ranked by the objective, best first; of some rules, or of all."""
    with closing(experiment.read_study()) as study:
        return _leaders(study, top, _rules(study, only))[:top]


def parameters(experiment: Experiment) -> list[str]:
    """The parameters of all rules' cells, in the order of the first rule."""
    with closing(experiment.read_study()) as study:
        names = dict.fromkeys(axis.name for rule in study.rules() for axis in study.axes(rule))
        return list(names | ({"lr": None} if study.spec.get("lr_from") else {}))


def best_per(experiment: Experiment, names: Sequence[str], only: Sequence[str] = ()) -> list[Ranked]:
    """As `best`, but the best cell of each rule for each combination of the parameters `names`."""
    with closing(experiment.read_study()) as study:
        rules = _rules(study, only)
        return ranking_per([row for row in study.rows() if row.rule in rules], names)


@dataclass(frozen=True)
class Ranking:
    """The `top` cells, the best one of each rule (`winners`), both best first; how many cells are in each state; the
    parameters with more than one value; the first cell that failed; and where to look further.
    """

    top: list[Ranked]
    winners: list[Ranked]
    counts: dict[str, int]
    varying: frozenset[str]
    failure: Row | None
    further: Further


def ranking(experiment: Experiment, top: int, only: Sequence[str] = ()) -> Ranking:
    """What came out so far, of some rules or of all. It reads no more cells than are shown.

    Raises UsageError for a rule that the experiment does not have.
    """
    with closing(experiment.read_study()) as study:
        rules = _rules(study, only)
        counts: dict[str, int] = dict.fromkeys(STATES, 0)
        for tally in study.tally():
            counts[tally.state] += tally.count if tally.rule in rules else 0
        leaders = _leaders(study, top, rules)
        failed = [row for row in study.rows(state="failed") if row.rule in rules][:1] if counts["failed"] else []
        best = winners(leaders)
        beyond = further(experiment, study, best)
        return Ranking(leaders[:top], best, counts, study.varying(), failed[0] if failed else None, beyond)


def _leaders(study: StudyView, top: int, rules: Sequence[str]) -> list[Ranked]:
    return rank([row for rule in rules for row in study.leaders(rule, top)])


def _rules(study: StudyView, only: Sequence[str]) -> list[str]:
    known = study.rules()
    for rule in only:
        if rule not in known:
            raise UsageError(f"There is no rule {rule!r} in this experiment.{did_you_mean(rule, known)}")
    return [rule for rule in known if not only or rule in only]


def train_report(experiment: Experiment) -> dict[str, Any]:
    """What came out of a single execution. Raises RunError with the cause if the rule failed."""
    row = rows(experiment)[0]
    if row.state == "failed":
        last = (row.error or "").strip().splitlines()[-1]
        raise RunError(
            f"The execution failed: {last}\nSee `bpf status {experiment.directory} --failed`; "
            f"`bpf resume {experiment.directory} --retry-failed` tries again."
        )
    result = row.result or {}
    record = result["executions"][0]
    return {
        "status": row.state,
        "dataset": row.spec["dataset"],
        "algorithm": row.rule,
        "seed": record["seed"],
        "device": result["device"],
        "epochs": record["epochs"],
        "train": record["train"],
        "val": record["val"],
        "test": record["test"],
        "seconds": {
            "total": record["seconds"],
            "per_epoch": record["seconds"] / record["epochs"],
            "tracking": record.get("tracking_seconds", 0.0),
        },
        "samples_per_second": result["examples"] * record["epochs"] / record["seconds"],
    }


@dataclass(frozen=True)
class Outset:
    """How an experiment stands when work on it begins, for whoever shows the progress.

    `cost` is the work of the cells that are not finished, `best` the best value of each rule. `varying` are the
    parameters with more than one value.
    """

    objective: str
    total: int
    open: int
    cost: float
    best: dict[str, float]
    varying: frozenset[str]

    @classmethod
    def of(cls, study: StudyView, objective: str, executions: int) -> "Outset":
        tallies = study.tally()
        left = [tally for tally in tallies if tally.state in OPEN]
        found = {rule: study.best(rule) for rule in study.rules()}
        best = {rule: one[1] for rule, one in found.items() if one is not None}
        return cls(
            objective,
            sum(tally.count for tally in tallies),
            sum(tally.count for tally in left),
            sum(tally.cost for tally in left) * executions,
            best,
            study.varying(),
        )


def _utc(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")

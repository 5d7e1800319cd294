"""What an experiment leaves behind on disk and does not need any more."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from bpf.errors import UsageError
from bpf.experiment.directory import Experiment
from bpf.study.owner import is_held
from bpf.study.plan import OPEN, Row
from bpf.study.study import Study


def superfluous(experiment: Experiment, kept_checkpoints: bool = False) -> list[Path]:
    """The files that can go: of cells that are finished, of processes that have died, and of older formats.

    `kept_checkpoints` includes those that were kept on purpose. Raises UsageError while anybody trains.
    """
    with experiment.running(), closing(experiment.open_study()) as study:
        if study.workers():
            raise UsageError(f"Workers are training in {experiment.directory}. Clean it when they have ended.")
        rows = study.rows()
        found = [
            *_temporary(experiment),
            *_checkpoints(experiment, rows, kept_checkpoints or not experiment.keep_checkpoints),
            *_models(experiment, study, rows),
            *(lock for lock in study.locks.glob("*.lock") if study.database.path and not is_held(lock)),
            *(log for row in rows if (log := experiment.directory / "logs" / f"{row.key}.json").exists()),
        ]
    return sorted(found)


def _temporary(experiment: Experiment) -> Iterator[Path]:
    """What `files.write_atomically` had not renamed yet, and a database that was being made."""
    for directory in {experiment.directory, experiment.files}:
        yield from directory.glob(".*.????????")
        yield from directory.glob("checkpoints/.*.????????")
        yield from directory.glob("models/*/.*.????????")
        yield from directory.glob("study.new.db*")


def _checkpoints(experiment: Experiment, rows: list[Row], kept: bool) -> Iterator[Path]:
    needed = {row.cohort for row in rows if row.state in OPEN or not kept}
    for path in (experiment.files / "checkpoints").glob("*.pt"):
        if path.stem not in needed:
            yield path


def _models(experiment: Experiment, study: Study, rows: list[Row]) -> Iterator[Path]:
    best = {found[0] for rule in {row.rule for row in rows} if (found := study.best(rule))}
    for path in (experiment.files / "models").glob("*/*.safetensors"):
        if path.stem not in best:
            yield path

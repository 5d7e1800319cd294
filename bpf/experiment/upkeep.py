"""What an experiment leaves behind on disk and does not need any more: only what is known to be its own."""

import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from bpf.errors import UsageError
from bpf.experiment import places
from bpf.experiment.bucket import Bucket
from bpf.experiment.directory import Experiment
from bpf.files import TEMPORARY
from bpf.locks import is_held
from bpf.study.cells import OPEN, Row
from bpf.study.owner import lock_files
from bpf.study.study import Study

_COHORT = re.compile(r"[0-9a-f]{16}\.pt")


def superfluous(experiment: Experiment, kept_checkpoints: bool = False) -> list[Path]:
    """The files that can go: of cells that are finished, of processes that have died, and of older formats.

    They are those with exactly the names that bpf gives to files of cells that the study knows, of which none is
    looked for behind a link, and in a folder outside the experiment only where its mark is. `kept_checkpoints` includes
    checkpoints that were kept on purpose. Raises UsageError while anybody trains.
    """
    with _at_rest(experiment) as study:
        rows = study.rows()
        found = {
            *_in_directory(experiment, rows),
            *(lock for lock in lock_files(study.locks) if study.database.path and not is_held(lock)),
        }
        if places.belongs(experiment.files, experiment.directory, experiment.mark):
            found |= {
                *_checkpoints(experiment, rows, kept_checkpoints or not experiment.keep_checkpoints),
                *_models(experiment, study, rows),
            }
    return sorted(path for path in found if path.is_file() and not _is_linked(path, experiment))


def superfluous_stored(experiment: Experiment, bucket: Bucket) -> dict[str, int]:
    """Which checkpoints at a URL can go, and their bytes: all but those of cells that go on and those set aside.

    Raises UsageError while anybody trains, and if what lies there is not the experiment's.
    """
    with _at_rest(experiment) as study:
        if not bucket.check(experiment.mark):
            return {}
        needed = {f"{row.cohort}.pt" for row in study.rows() if row.state in OPEN}
        found = {}
        for name, size in bucket.names().items():
            unfinished = re.fullmatch(TEMPORARY, name)
            if _COHORT.fullmatch(unfinished[1] if unfinished else name) and name not in needed:
                found[name] = size
        return found


@contextmanager
def _at_rest(experiment: Experiment) -> Iterator[Study]:
    """The study, while nobody trains. Raises UsageError if anybody does."""
    with experiment.running(), closing(experiment.open_study()) as study:
        if study.workers():
            raise UsageError(f"Workers are training in {experiment.directory}. Clean it when they have ended.")
        yield study


def _in_directory(experiment: Experiment, rows: list[Row]) -> Iterator[Path]:
    """What was being written, and the histories of bpf 0.1."""
    yield from _unfinished(experiment.directory, {"experiment.yaml"})
    yield from (experiment.directory / f"study.new.db{end}" for end in ("", "-wal", "-shm", "-journal"))
    yield from (experiment.directory / "logs" / f"{row.key}.json" for row in rows)


def _checkpoints(experiment: Experiment, rows: list[Row], kept: bool) -> Iterator[Path]:
    from bpf.training import checkpoint

    directory, names = experiment.files / "checkpoints", {row.name for row in rows}
    known = {row.cohort for row in rows if row.cohort}
    for path in directory.glob("*.pt") if not directory.is_symlink() else ():  # of cohorts that were split since
        if _COHORT.fullmatch(path.name) and path.stem not in known and names.issuperset(checkpoint.cells(path) or [""]):
            known.add(path.stem)
    needed = {row.cohort for row in rows if row.state in OPEN or not kept}
    yield from (directory / f"{cohort}.pt" for cohort in known - needed)
    yield from _unfinished(directory, {f"{cohort}.pt" for cohort in known})


def _models(experiment: Experiment, study: Study, rows: list[Row]) -> Iterator[Path]:
    directory = experiment.files / "models"
    best = {found[0] for rule in study.rules() if (found := study.best(rule))}
    keys = [(row.rule, row.key) for row in rows]
    keys += [(rule, key) for rule in study.rules() for key in study.former]
    known = {places.model_path(directory, *one) for one in keys}
    yield from (path for path in known if path.stem not in best)
    for folder in {path.parent for path in known} if not directory.is_symlink() else ():
        yield from _unfinished(folder, {path.name for path in known})


def _unfinished(directory: Path, names: set[str]) -> Iterator[Path]:
    """What `files.write_atomically` had not renamed yet to one of the names."""
    for path in directory.glob(".*") if not directory.is_symlink() else ():
        found = re.fullmatch(TEMPORARY, path.name)
        if found and found[1] in names:
            yield path


def _is_linked(path: Path, experiment: Experiment) -> bool:
    """Whether a file, or a folder between it and the one of the experiment that holds it, is a link."""
    between = (folder for folder in path.parents if folder not in (experiment.directory, experiment.files))
    inside = [folder for folder in between if {experiment.directory, experiment.files} & set(folder.parents)]
    return path.is_symlink() or any(folder.is_symlink() for folder in inside)

"""Where workers keep checkpoints and models: in a folder, or elsewhere, worked on in a folder of this machine."""

import re
import secrets
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from filelock import FileLock

from bpf.errors import BpfError, RunError
from bpf.experiment.bucket import Bucket
from bpf.experiment.places import checkpoint_path, model_path
from bpf.locks import is_held, private
from bpf.machine import user
from bpf.results import models
from bpf.study.seam import PATIENCE_SECONDS, WorkerStudy, patiently
from bpf.training import checkpoint
from bpf.workers.job import Job

T = TypeVar("T")


class Files(Protocol):
    """Checkpoints by cohort, and models by rule and cell.

    `on_wait` is told what the matter is with a place that fails in a way that may pass, and may raise to give up.
    """

    on_wait: Callable[[str], object]

    def checkpoint(self, cohort: str, begun: bool) -> Path:
        """Where the checkpoint of a cohort is read and written; what is kept of one that was `begun` lies there."""
        ...

    def store(self, cohort: str) -> None:
        """Keep the checkpoint that has been written."""
        ...

    def set_aside(self, cohort: str) -> str:
        """Keep a damaged checkpoint under another name, which is returned."""
        ...

    def discard(self, cohort: str) -> None:
        """Remove a checkpoint that is of no more use; that it cannot be removed is no reason to fail."""
        ...

    def save_model(self, rule: str, key: str, content: bytes) -> None: ...

    def clear(self, study: WorkerStudy[Any], rule: str, cohort: str | None) -> None:
        """Remove what is of no more use when a cohort has finished: its checkpoint, if it is given, and the networks
        of cells of the rule that are finished and not the best. One that is not finished may become it.
        """
        ...

    def close(self) -> None:
        """Remove what only this process has needed."""
        ...


class Folder:
    """An experiment's own files, on this machine or in a folder that is shared."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.on_wait: Callable[[str], object] = lambda reason: None

    def checkpoint(self, cohort: str, begun: bool = True) -> Path:
        return checkpoint_path(self.path, cohort)

    def store(self, cohort: str) -> None:
        pass

    def set_aside(self, cohort: str) -> str:
        return checkpoint.set_aside(self.checkpoint(cohort)).name

    def discard(self, cohort: str) -> None:
        with suppress(OSError):
            self.checkpoint(cohort).unlink(missing_ok=True)

    def save_model(self, rule: str, key: str, content: bytes) -> None:
        models.save(model_path(self.path / "models", rule, key), content)

    def clear(self, study: WorkerStudy[Any], rule: str, cohort: str | None = None) -> None:
        if cohort is not None:
            self.discard(cohort)
        kept = models.kept(self.path / "models", rule)
        finished = study.finished(kept)
        best = study.best(rule)  # looked for last: what had finished by then and is not the best will never be it
        for key in finished - ({best[0]} if best is not None else finished):
            models.discard(kept[key])

    def close(self) -> None:
        pass


class Stored:
    """Checkpoints at a URL, through a folder of this process; models where `files` has them."""

    def __init__(self, files: Files, bucket: Bucket) -> None:
        self._files, self._bucket = files, bucket
        self._scratch: Scratch | None = None
        self.on_wait: Callable[[str], object] = lambda reason: None

    def checkpoint(self, cohort: str, begun: bool = True) -> Path:
        path = emptied(self._here(cohort))
        if begun:
            self._patiently(lambda: self._bucket.fetch(path))
        return path

    def store(self, cohort: str) -> None:
        self._patiently(lambda: self._bucket.put(self._here(cohort)))

    def set_aside(self, cohort: str) -> str:
        path = self._here(cohort)
        path.unlink(missing_ok=True)
        return self._bucket.at(self._patiently(lambda: self._bucket.set_aside(path.name)))

    def discard(self, cohort: str) -> None:
        path = self._here(cohort)
        with suppress(OSError):
            path.unlink(missing_ok=True)
        with suppress(BpfError):
            self._bucket.remove(path.name)

    def save_model(self, rule: str, key: str, content: bytes) -> None:
        self._files.save_model(rule, key, content)

    def clear(self, study: WorkerStudy[Any], rule: str, cohort: str | None) -> None:
        if cohort is not None:
            self.discard(cohort)
        self._files.clear(study, rule, None)

    def close(self) -> None:
        if self._scratch is not None:
            self._scratch.close()
        self._files.close()

    def _here(self, cohort: str) -> Path:
        if self._scratch is None:
            self._scratch = Scratch()
        return self._scratch.checkpoint(cohort)

    def _patiently(self, step: Callable[[], T]) -> T:
        """Do a step again while it fails, as long as workers wait for a database."""
        return patiently(step, RunError, PATIENCE_SECONDS, lambda said: self.on_wait(f"{said} It is tried again."))


class Scratch(Folder):
    """A folder of this process alone, which is gone when it has ended, or when the next one looks."""

    def __init__(self) -> None:
        root = private(Path(tempfile.gettempdir()) / f"bpf-scratch-{user()}")
        super().__init__(root / secrets.token_hex(8))
        self._lock = FileLock(self.path / "lock", thread_local=False)
        with FileLock(root / "lock"):  # else a folder could be taken for one that is left before its own lock is held
            for left in root.iterdir():
                if re.fullmatch("[0-9a-f]{16}", left.name) and not is_held(left / "lock"):
                    _remove(left)
            self.path.mkdir()
            self._lock.acquire()

    def close(self) -> None:
        _remove(self.path)
        self._lock.release()


def emptied(path: Path) -> Path:
    """The path of a checkpoint in a scratch folder, from which those of cohorts before are removed."""
    for other in path.parent.glob("*"):
        other.unlink(missing_ok=True)
    return path


def open_files(job: Job) -> Files:
    folder = Folder(job.files)
    return Stored(folder, Bucket(job.checkpoints, job.experiment)) if job.checkpoints else folder


def _remove(scratch: Path) -> None:
    """Remove what a scratch folder holds: checkpoints, also those that were being written, and its lock."""
    if scratch.is_symlink() or (scratch / "checkpoints").is_symlink():
        return
    with suppress(OSError):
        for path in (scratch / "checkpoints").glob("*"):
            if re.search(r"\.pt(\.|$)", path.name):
                path.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            (scratch / "checkpoints").rmdir()
        (scratch / "lock").unlink(missing_ok=True)
        scratch.rmdir()

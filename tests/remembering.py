"""Experiments that several tests begin with: trained once in each process that runs tests, then copied."""

import shutil
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from bpf.experiment.directory import open_experiment
from bpf.interrupts import Interrupted
from bpf.workers.events import Trained
from bpf.workers.job import Job, Terms
from bpf.workers.stopping import Stop
from bpf.workers.worker import Worker

_KEPT: dict[tuple[Any, ...], tuple[Path, Any, Path]] = {}
_PLACE = tempfile.TemporaryDirectory(prefix="bpf-remembered-")


def remembered(directory: Path, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """Let `make` make the new `directory`, or copy what it made there for an equal `key`; returns what it returned.

    The key must say all that the result depends on. A directory that `make` does not make is not remembered.
    """
    assert not directory.exists()
    if key not in _KEPT:
        told = make()
        if not directory.is_dir():
            return told
        copy = Path(_PLACE.name) / str(len(_KEPT))
        shutil.copytree(directory, copy, symlinks=True)
        _KEPT[key] = copy, told, directory.resolve().parent
        return told
    copy, told, before = _KEPT[key]
    shutil.copytree(copy, directory, symlinks=True)
    settings = directory / "experiment.yaml"  # which knows where data sets lie
    settings.write_text(settings.read_text().replace(str(before), str(directory.resolve().parent)))
    return told


def stop_after_an_epoch(directory: Path) -> None:
    """Train what is planned there, and stop with a checkpoint."""
    experiment, stop = open_experiment(directory), Stop()
    where = (experiment.database, experiment.name, experiment.data_dir, experiment.files)
    job = Job(*where, Terms(checkpoint_seconds=1e9))
    with closing(experiment.open_study()) as study, pytest.raises(Interrupted):
        Worker.of(job, study, lambda event: stop.request() if isinstance(event, Trained) else None, stop).run()

"""What every worker of a cluster is told, and what its node must have."""

from contextlib import suppress
from importlib import metadata
from typing import Any

import numpy as np

from bpf.cluster.engine import Engine
from bpf.cluster.post import code_of
from bpf.data.cache import Data
from bpf.experiment.directory import Experiment
from bpf.registry import ALGORITHMS, TRACKERS, Plugin, Registry


def order(experiment: Experiment, data: Data, checkpoint_seconds: float, engine: Engine) -> dict[str, Any]:
    """What is the same for all workers; the data set goes to Ray's object store, which has it once on each node.

    No password is in it: what a task is given can be seen by others.
    """
    arrays = (data.train_images, data.train_labels, data.test_images, data.test_labels)
    references = [engine.ray.put(np.asarray(array.numpy()).view(np.ndarray)) for array in arrays]
    return {
        "needs": needs(experiment),
        "names": {ALGORITHMS: list(experiment.grid.algorithm), TRACKERS: list(experiment.grid.trackers)},
        "code": code(experiment),
        "checkpoint_seconds": checkpoint_seconds,
        "facts": {"dashboard": engine.dashboard} if engine.dashboard else {},
        "storage": None if experiment.database.path else experiment.database.public,
        "experiment": experiment.name,
        "files": str(experiment.files.resolve()),
        "mark": dict(experiment.mark) if experiment.files != experiment.directory else None,
        "checkpoints": experiment.checkpoints,
        "data": (data.name, list(data.classes), references),
    }


def code(experiment: Experiment) -> dict[str, str]:
    """Digests of the code that decides what comes out: of bpf, and of the packages that have the rules and trackers."""
    packages = {plugin.target.partition(":")[0].partition(".")[0] for plugin in _plugins(experiment)}
    return {package: code_of(package) for package in sorted(packages | {"bpf"})}


def needs(experiment: Experiment) -> dict[str, str]:
    """The distributions that workers need, with their versions here: other ones may give other numbers."""
    found = {}
    for distribution in dict.fromkeys(["bpf", "torch", *(plugin.distribution for plugin in _plugins(experiment))]):
        with suppress(metadata.PackageNotFoundError):  # run from its source
            found[distribution] = metadata.version(distribution)
    return found


def _plugins(experiment: Experiment) -> list[Plugin]:
    """The rules and trackers that workers load."""
    wanted = {ALGORITHMS: experiment.grid.algorithm, TRACKERS: experiment.grid.trackers}
    return [Registry(group).describe(name) for group, names in wanted.items() for name in names]

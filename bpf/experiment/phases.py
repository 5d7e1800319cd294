"""Where the two phases lie: learning rates by objective `loss` or `error`, and the `val_*` grids that take them."""

import itertools
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from bpf.errors import BpfError
from bpf.experiment.directory import Experiment, open_experiment

OBJECTIVES = ("loss", "error")
"""What learning rates are found with."""


def phase_directory(directory: Path, objective: str) -> tuple[Path, Path | None]:
    """Where a grid search in `directory` goes, and the directory of the earlier phase that it can take rates from.

    A `val_*` phase of an experiment of `loss` or `error` lies in `DIRECTORY/OBJECTIVE`. Elsewhere it takes the rates of
    the experiment beside it of the same name but for the objective, such as `runs/digits-dfa-loss` for
    `runs/digits-dfa-val_loss`. Raises UsageError if there is an experiment that cannot be read.
    """
    if not objective.startswith("val_"):
        return directory, None
    if _finds_rates(directory):
        return directory / objective, directory
    if directory.name == objective and _finds_rates(directory.parent):
        return directory, directory.parent
    stem = directory.name.removesuffix(f"-{objective}")
    if stem != directory.name:
        same = objective.removeprefix("val_")
        for earlier in sorted(OBJECTIVES, key=lambda name: name != same):
            if _finds_rates(beside := directory.with_name(f"{stem}-{earlier}")):
                return directory, beside
    return directory, None


def _finds_rates(directory: Path) -> bool:
    if not (directory / "experiment.yaml").exists():
        return False
    experiment = open_experiment(directory)
    return experiment.kind == "tune" and experiment.grid.objective in OBJECTIVES


def source(experiment: Experiment) -> Path | None:
    """The experiment that a second phase has its learning rates from: the last one that was named, or the one found.

    None if it is not there, or not known.
    """
    named = [word for session in experiment.sessions() for word in _named_in(session["command"])]
    with suppress(BpfError):
        if not named:
            return phase_directory(experiment.directory, experiment.grid.objective)[1]
        if _finds_rates(Path(named[-1])):
            return Path(named[-1])
    return None


def _named_in(command: str) -> Iterator[str]:
    words = shlex.split(command)
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        option, equals, value = word.partition("=")
        if option == "--lr-from":
            yield value if equals else following

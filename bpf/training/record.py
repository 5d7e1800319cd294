"""What is known of one run: its scores epoch by epoch, its best one, and why it ended."""

from dataclasses import dataclass, field
from typing import Literal, NotRequired, TypedDict

from torch import Tensor

from bpf.nn.optim import State
from bpf.spec.run import RunSpec

Scores = dict[str, float | None]


@dataclass
class Record:
    """What is known of one run.

    `status` is running, complete or diverged; losses are means per example, errors
    fractions of wrong predictions (None in reconstruction). `train`, `val` and `test` are those of `best_epoch`,
    counted from 1, whose network is kept (with `keep` last it is the last one); `history` has one entry per epoch.
    `tracked` has one entry per measurement of the trackers, with the `step` and the `epoch` (a fraction, 0 before
    training) that they were taken at; they took `tracking_seconds` of `seconds`.
    """

    seed: int
    status: Literal["running", "complete", "diverged"] = "running"
    epochs: int = 0
    best_epoch: int = 0
    objective: float | None = None
    train: Scores | None = None
    val: Scores | None = None
    test: Scores | None = None
    history: dict[str, list[float]] = field(default_factory=dict)
    tracked: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    tracking_seconds: float = 0.0

    def log(self, epoch: int, scores: dict[str, float]) -> None:
        """Append an epoch's scores, such as `loss` and `val_error`, to the history."""
        self.epochs = epoch
        for name, value in scores.items():
            self.history.setdefault(name, []).append(value)

    def judge(self, spec: RunSpec, sound: bool) -> tuple[bool, bool]:
        """Whether the network of the epoch that was logged last is the one to keep, and whether the run leaves."""
        if not sound:
            self.status = "diverged"
            return False, True
        value = self.history[spec.objective][-1]
        better = spec.keep == "last" or self.objective is None or value < self.objective
        if better:
            self.objective, self.best_epoch = value, self.epochs
            self.train = _scores(self.history, "")
            self.val = _scores(self.history, "val_")
        return better, self.is_stale(spec) or self.epochs >= spec.epochs

    def is_stale(self, spec: RunSpec) -> bool:
        """Whether the run has not improved for as long as early stopping allows."""
        return 0 < spec.early_stopping <= self.epochs - self.best_epoch

    def can_go_on(self, spec: RunSpec) -> bool:
        """Whether a run that has ended would not have with the epochs that its spec has now."""
        return self.status == "complete" and self.epochs < spec.epochs and not self.is_stale(spec)

    def complete(self, loss: float, error: float | None) -> None:
        """End the run with the scores of its best network on the test set."""
        self.status, self.test = "complete", {"loss": loss, "error": error}


class Kept(TypedDict):
    """What is kept of a complete run that has left, on the CPU and without the run axis.

    `best` is its network in its best epoch, by the names of `Network.state()`; `network` and `optimizer` are those of
    its end, from where it can go on.
    """

    best: dict[str, Tensor]
    network: NotRequired[dict[str, Tensor]]
    optimizer: NotRequired[State]


def _scores(history: dict[str, list[float]], prefix: str) -> Scores | None:
    """The last epoch's loss and error of a part, or None when the part is empty."""
    if f"{prefix}loss" not in history:
        return None
    error = history.get(f"{prefix}error")
    return {"loss": history[f"{prefix}loss"][-1], "error": error[-1] if error else None}


def fraction(error: float, count: int) -> float:
    """The part of `count` examples that a mean in single precision means."""
    return round(error * count) / count

"""How much to train with, and where."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bpf.errors import UsageError
from bpf.spec.values import LOCAL, check_cluster, check_device

if TYPE_CHECKING:
    from bpf.study.database import Database


@dataclass(frozen=True)
class Effort:
    """How to train, without any effect on what comes out.

    `workers` is how many processes, None for one per processor core or GPU; `device` is where, as in a spec or
    several joined by commas. `max_hours` ends the work in an orderly way after that time. `on` is a Ray cluster, as in
    `bpf tune --on`, where `workers_per_gpu` share a GPU. Raises UsageError for what makes no sense.
    """

    workers: int | None = None
    device: str | None = None
    checkpoint_seconds: float = 30.0
    max_hours: float | None = None
    on: str | None = None
    workers_per_gpu: int = 1

    def __post_init__(self) -> None:
        for name, value, least, kind in (
            ("workers", self.workers, 1, int),
            ("workers_per_gpu", self.workers_per_gpu, 1, int),
            ("max_hours", self.max_hours, 0, (int, float)),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, kind) or value < least):
                number = "whole number" if kind is int else "number"
                raise UsageError(f"{name} {value!r}: give a {number} from {least} on.")
        if self.device is not None:
            try:
                check_device(self.device)
            except ValueError as error:
                raise UsageError(f"device {self.device!r} is not accepted: {error}.") from None
        if self.on is not None:
            try:
                check_cluster(self.on)
            except ValueError as error:
                raise UsageError(f"--on {self.on}: {error}.") from None
        elif self.workers_per_gpu != 1:
            raise UsageError("Workers share a GPU by --workers here; --workers-per-gpu is for a cluster (--on).")

    def check_storage(self, storage: "Database | None") -> None:
        """Raise UsageError if workers elsewhere would have to be told a password: what a task is given can be seen."""
        if self.on is not None and storage is not None and storage.path is None and storage.url.password:
            raise UsageError(
                "With --on each node reaches the server by itself, and no password is sent there: leave it out of the "
                "URL, and put it in PGPASSWORD or ~/.pgpass of each node."
            )

    @property
    def elsewhere(self) -> bool:
        """Whether other machines train, of which nothing is known here."""
        return self.on not in (None, LOCAL)

    def check_one_device(self) -> None:
        """Raise UsageError if there are several devices, for what is trained in one process."""
        if "," in (self.device or ""):
            raise UsageError(f"device {self.device}: one process trains on one device. Give one of them.")


AS_USUAL = Effort()

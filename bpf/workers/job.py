"""What a worker works on, and where."""

from dataclasses import dataclass, field
from pathlib import Path

from bpf.experiment.places import checkpoint_path
from bpf.study.database import Database

CHECKPOINT_SECONDS = 30.0


@dataclass(frozen=True)
class Job:
    """What a worker works on, and where; it is pickled, as it goes to other processes.

    `files` is where checkpoints and models lie; `sharers` is how
    many workers use the device; `checkpoint_seconds` is the least time between two checkpoints of a cohort. `home` is
    where relative paths begin, such as that of `folder:images`.
    """

    storage: Database
    experiment: str
    data_dir: Path
    files: Path
    device: str = "auto"
    sharers: int = 1
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    home: Path = field(default_factory=Path.cwd)

    def checkpoint(self, cohort: str) -> Path:
        return checkpoint_path(self.files, cohort)

    @property
    def models(self) -> Path:
        return self.files / "models"

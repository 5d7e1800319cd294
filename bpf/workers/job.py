"""What a worker works on, and where."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bpf.study.database import Database

CHECKPOINT_SECONDS = 30.0


@dataclass(frozen=True)
class Terms:
    """How a worker trains: on which `device`, of which it is one of so many `sharers`.

    `checkpoint_seconds` is the least time between two checkpoints of a cohort. `facts` are what is told of the worker
    besides its host, device and versions.
    """

    device: str = "auto"
    sharers: int = 1
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """What a worker of this machine works on, and where; it is pickled, as it goes to other processes.

    `files` is where checkpoints and models lie; `checkpoints` is a URL if the former lie elsewhere. `home` is where
    relative paths begin, such as that of `folder:images`.
    """

    storage: "Database"
    experiment: str
    data_dir: Path
    files: Path
    terms: Terms = Terms()
    checkpoints: str | None = None
    home: Path = field(default_factory=Path.cwd)

"""Where experiments and their files lie: what they are called, which folders are theirs, and none behind a link."""

import glob
import re
from collections.abc import Iterable
from pathlib import Path

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from bpf.errors import BpfError, UsageError
from bpf.experiment.file import read
from bpf.files import explaining, write_json
from bpf.reading import check_name, file_name, fitting, json_of, text_of

MARKER = "bpf-files.json"
"""It says whose files lie in a folder outside an experiment's directory."""
KEPT = ("checkpoints", "models")
"""What lies in such a folder."""
PARTS = (
    *("experiment.yaml", "running.lock", "study.db", "study.db-wal", "study.db-shm", "study.db-journal"),
    *("study.new.db", "locks", "logs", *KEPT, "report", "tensorboard", "metrics"),
)
"""What bpf makes in an experiment's directory."""


class Mark(TypedDict):
    """The experiment that a folder belongs to; `created` is None for one that is known by its name only."""

    experiment: str
    created: str | None


_MARK: TypeAdapter[Mark] = TypeAdapter(Mark)


def check_links(directory: Path, parts: Iterable[str] = PARTS) -> None:
    """Raise UsageError if what bpf writes to is a link: who made it may have meant any file by it."""
    named = [directory / part for part in parts]
    inside = [path for folder in ("locks", *KEPT) for path in (directory / folder).glob("*")]
    for path in (*named, *inside):
        if path.is_symlink():
            raise UsageError(
                f"{path} is a link, and bpf neither writes nor deletes through links. Put what it stands for in its "
                "place; a study or checkpoints can lie elsewhere with --storage and --checkpoints."
            )


def belongs(files: Path, directory: Path | None, mark: Mark) -> bool:
    """Whether what bpf's names stand for in `files` is the experiment's: in its `directory`, or where its mark is."""
    if directory is not None and files.resolve() == directory.resolve():
        return True
    try:
        if (files / "experiment.yaml").exists():
            content = read(files / "experiment.yaml")
            found: Mark = {"experiment": content.name, "created": content.created}
        else:
            found = fitting(_MARK, json_of(text_of(files / MARKER)))
    except (OSError, ValueError, BpfError):
        return False
    created = {found["created"], mark["created"]} - {None}
    return found["experiment"] == mark["experiment"] and len(created) < 2


def check(files: Path, directory: Path | None, mark: Mark) -> bool:
    """Whether a folder for checkpoints and models is the experiment's by now. Nothing is written.

    Raises UsageError if it is not and cannot become it, as it holds anything else. One without a mark that holds
    nothing but what bpf puts there is of bpf 0.2 or older, and becomes the experiment's.
    """
    check_links(files, KEPT)
    if belongs(files, directory, mark):
        return True
    with explaining(files):
        there = {entry.name for entry in files.iterdir()} if files.exists() else set()
        if there - set(KEPT):
            raise UsageError(
                f"{files} is to hold the checkpoints of {mark['experiment']!r}, and holds something else. Choose "
                "another folder with --checkpoints, or empty this one."
            )
    return False


def take(files: Path, directory: Path | None, mark: Mark) -> None:
    """Make a folder for checkpoints and models, and mark it as the experiment's, where `check` allows it."""
    if not check(files, directory, mark):
        write_json(files / MARKER, mark)


def checkpoint_path(files: Path, cohort: str) -> Path:
    """Where the checkpoint of a cohort lies, in the folder of an experiment's files."""
    return files / "checkpoints" / f"{cohort}.pt"


def model_path(models: Path, rule: str, key: str) -> Path:
    """Where the network of a cell lies in an experiment's directory of models."""
    return models / file_name(rule) / f"{key}.safetensors"


def unexpanded(path: Path) -> str:
    """What to say of a path that is not there if the shell was to make others of it."""
    if not re.search(r"[*?\[]", str(path)):
        return ""
    found = glob.glob(str(path))  # noqa: PTH207 - a pattern may be absolute
    return ", as quotes kept the shell from expanding it" if found else ", as nothing matches this pattern"


def named(name: str) -> str:
    """A name for an experiment, which becomes a part of paths. Raises UsageError for one that cannot be that."""
    try:
        return check_name(name)
    except ValueError as error:
        raise UsageError(f"The experiment cannot be called {name!r}: {error}. Give another --experiment.") from error


def default_name(directory: Path) -> str:
    """A later phase, inside an experiment's directory, is named after both, as it may share a database with others."""
    inside = (directory.parent / "experiment.yaml").exists()
    return f"{directory.parent.name}-{directory.name}" if inside else directory.name


def find(root: Path) -> list[Path]:
    """The experiments below `root` and their later phases, the one touched last first."""

    def touched(directory: Path) -> float:
        files = (directory / name for name in ("experiment.yaml", "study.db", "study.db-wal"))
        return max((path.stat().st_mtime for path in files if path.exists()), default=0.0)

    found = [path.parent for pattern in ("*", "*/val_*") for path in root.glob(f"{pattern}/experiment.yaml")]
    return sorted(found, key=touched, reverse=True)

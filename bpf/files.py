"""Writing files so that a crash, a full disk or a power cut leaves the old file or the new one, never half.

And so that what a user asks for is not written over something else: see `check_place` and `check_output`.
"""

import errno
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from bpf.errors import DiskFull, UsageError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OF_EXPERIMENT = re.compile(
    r"experiment\.yaml|running\.lock|study(\.new)?\.db(-.*)?|locks|logs|models|checkpoints", re.IGNORECASE
)
"""What an experiment itself keeps in its directory; the rest is free, for reports and exports."""
TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}", re.DOTALL)
"""What `write_atomically` calls a file before it has the name in the first group."""
_ENDS = 2**18
"""So many bytes at each end tell what a file is."""


def is_dir(path: Path | str) -> bool:
    """Whether there is such a directory; False also for what no file system can hold, where pathlib raises."""
    return os.path.isdir(path)  # noqa: PTH112


def is_file(path: Path | str) -> bool:
    """As `is_dir`, for a file."""
    return os.path.isfile(path)  # noqa: PTH113


def exists(path: Path | str) -> bool:
    """As `is_dir`, for anything."""
    return os.path.exists(path)  # noqa: PTH110


def at_home(path: str | Path) -> Path:
    """A path with `~` and `~user` written out; those of nobody stay as they are, where pathlib raises."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


@contextmanager
def explaining(path: Path) -> Iterator[None]:
    """Turn what the system says about `path` into an error for a person."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise DiskFull(path) from error
        raise UsageError(f"{path} cannot be written: {error.strerror or error}. Choose another directory.") from error


def check_place(path: Path) -> None:
    """Raise UsageError if a file or a folder that a user names for output belongs to an experiment itself."""
    for place in (Path(os.path.realpath(path)), Path(os.path.normpath(path.absolute()))):
        for directory in place.parents:
            own = place.relative_to(directory).parts[0]
            if _OF_EXPERIMENT.fullmatch(own) and (directory / "experiment.yaml").exists():
                raise UsageError(f"{path} belongs to the experiment {directory} itself. Choose another place.")


def check_output(path: Path, what: str, made: re.Pattern[bytes]) -> None:
    """Raise UsageError if writing the file `path`, which a user names for output, would destroy something.

    A file that is there already is replaced only if it is an earlier output, whose first and last bytes `made` matches,
    or empty. `what` says what that is.
    """
    check_place(path)
    with explaining(path):
        if not path.exists():
            return
        if path.is_file():
            with path.open("rb") as file:
                ends = file.read(_ENDS)
                file.seek(max(file.tell(), path.stat().st_size - _ENDS))
                ends += file.read()
            if not ends or made.match(ends):
                return
    raise UsageError(f"{path} exists and is no {what}, so it is not replaced. Choose another name.")


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write to a temporary file beside `path`, sync it, and put it in place.

    Raises DiskFull when there is no space and UsageError when the place cannot be written to.
    """
    with explaining(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with new.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        except BaseException:
            with suppress(OSError):
                new.unlink()
            raise
        sync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, separators=(",", ":")))


def sync_directory(directory: Path) -> None:
    """Make a rename or new files in `directory` survive a power cut."""
    if os.name != "posix":  # elsewhere a directory cannot be opened
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

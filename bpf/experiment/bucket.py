"""Checkpoints at a URL: an object store such as `s3://bucket/folder`, or whatever else fsspec reaches."""

import json
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import TypeAdapter

from bpf.errors import BpfError, RunError, UsageError, did_you_mean
from bpf.experiment.places import MARKER, Mark
from bpf.files import write_atomically
from bpf.reading import LARGEST_TEXT, check_path, fitting, json_of

CHUNK = 2**23
PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "hf": "huggingface_hub",
}
"""What fsspec needs for the object stores, in which a file is there when it is there whole."""
_MARK: TypeAdapter[Mark] = TypeAdapter(Mark)


def is_url(text: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE) is not None


def check_url(url: str) -> str:
    """A URL that checkpoints can lie at. Raises UsageError for one that cannot be, or holds a password.

    What is needed to reach it is imported, and nothing is asked.
    """
    import fsspec

    kind = url.partition("://")[0].lower()
    try:
        check_path(url)
        if urlsplit(url).username is not None:
            raise UsageError("The URL of --checkpoints holds a user or a password; keep them in the environment.")
    except ValueError as error:
        raise UsageError(f"--checkpoints {url}: {error}.") from error
    if kind not in fsspec.available_protocols():
        known = did_you_mean(kind, ["s3", "gs", "az", "sftp", "hdfs", "smb"])
        raise UsageError(f"--checkpoints {url}: there is no store called {kind!r}.{known}")
    try:
        fsspec.get_filesystem_class(kind)
    except ImportError as error:
        package = PACKAGES.get(kind)
        cure = f"pip install {package}" if package else str(error)
        raise UsageError(f"--checkpoints {url} needs another library: {cure}") from error
    return url.rstrip("/")


class Bucket:
    """The checkpoints of one experiment, in a folder of its name below a URL.

    Raises RunError for what the store says, which may pass.
    """

    def __init__(self, url: str, experiment: str) -> None:
        import fsspec

        self.url = f"{url.rstrip('/')}/{experiment}"
        self._whole = url.partition("://")[0].lower() in PACKAGES
        with self._explaining():
            self._fs, self._root = fsspec.core.url_to_fs(self.url)

    def at(self, name: str) -> str:
        return f"{self.url}/{name}"

    def take(self, mark: Mark) -> None:
        """Mark the folder as the experiment's. Raises UsageError if it is another's, or holds something else."""
        with self._explaining():
            there = {Path(str(entry)).name for entry in self._listed()}
            if MARKER in there:
                content = self._fs.cat_file(f"{self._root}/{MARKER}", 0, LARGEST_TEXT)
                try:
                    found = fitting(_MARK, json_of(content.decode()))
                except ValueError:
                    found = None
                if found == mark:
                    return
            if there:
                raise UsageError(
                    f"{self.url} is to hold the checkpoints of {mark['experiment']!r}, and holds something else. "
                    "Choose another place with --checkpoints."
                )
            self._write(MARKER, lambda place: self._fs.pipe_file(place, json.dumps(mark).encode()))

    def put(self, path: Path) -> None:
        """Store a file of this machine under its name; the old one is there until the new one is."""
        with self._explaining():
            self._write(path.name, lambda place: self._fs.put_file(str(path), place))

    def fetch(self, path: Path) -> None:
        """Bring what is stored under a file's name to this machine; if nothing is, there is no such file here."""
        with self._explaining():
            path.unlink(missing_ok=True)
            with suppress(FileNotFoundError), self._fs.open(f"{self._root}/{path.name}", "rb") as stored:
                write_atomically(path, lambda file: file.writelines(_chunks(stored)))

    def remove(self, name: str) -> None:
        with self._explaining(), suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root}/{name}")

    def _listed(self) -> list[Any]:
        self._fs.invalidate_cache()
        try:
            return list(self._fs.ls(self._root, detail=False))
        except FileNotFoundError:
            return []

    def _write(self, name: str, write: Callable[[str], object]) -> None:
        place = f"{self._root}/{name}"
        if self._whole:
            write(place)
            return
        self._fs.makedirs(self._root, exist_ok=True)
        new = f"{self._root}/.{name}.{secrets.token_hex(4)}"
        write(new)
        self._fs.mv(new, place)

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Each store has its own exceptions: all are one failure here."""
        try:
            yield
        except BpfError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise RunError(f"The checkpoints at {self.url} cannot be reached: {reason}.") from error


def _chunks(file: Any) -> Iterator[bytes]:
    while chunk := file.read(CHUNK):
        yield chunk

"""Checkpoints at a URL: an object store such as `s3://bucket/folder`, or whatever else fsspec reaches."""

import itertools
import json
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any

from pydantic import TypeAdapter

from bpf.errors import BpfError, RunError, UsageError, did_you_mean
from bpf.experiment.places import MARKER, Mark
from bpf.files import TEMPORARY, write_atomically
from bpf.reading import LARGEST_TEXT, check_path, fitting, is_plain, json_of

CHUNK = 2**23
OBJECT_STORES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "oss": "ossfs",
    "hf": "huggingface_hub",
}
"""What fsspec needs for the object stores, in which a file is there when it is there whole."""
BUCKETS = OBJECT_STORES.keys() - {"hf"}
"""Where the first part of a path is a bucket, or a container, that somebody has to make."""
PACKAGES = OBJECT_STORES | {"sftp": "paramiko", "ssh": "paramiko", "smb": "smbprotocol", "hdfs": "pyarrow"}
SSH = ("sftp", "ssh")
_MARK: TypeAdapter[Mark] = TypeAdapter(Mark)
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.IGNORECASE | re.DOTALL)
_NEARLY = re.compile(r"([a-z][a-z0-9+.-]+):/*(.*)", re.IGNORECASE | re.DOTALL)


def place_at(given: str) -> Path | str:
    """A folder, or the URL of a store, as given to --checkpoints. Raises UsageError for one that cannot be."""
    found = _URL.fullmatch(given)
    if found and found[1].lower() == "file":
        if not Path(found[2]).is_absolute():
            raise UsageError(f"--checkpoints {_shown(given)}: after file:// comes a whole path. Write file:///PATH.")
        return Path(found[2])
    if found or "://" in given:
        return check_url(given)
    import fsspec

    nearly = _NEARLY.fullmatch(given)
    if nearly and nearly[1].lower() in fsspec.available_protocols() and not Path(given).exists():
        _check_secrets(nearly[2])
        slashes = "///" if nearly[1].lower() in ("file", "local") else "//"
        meant = f"{nearly[1].lower()}:{slashes}{nearly[2]}"
        raise UsageError(
            f"--checkpoints {_shown(given)}: neither a URL nor a folder that is there. Did you mean {_shown(meant)}?"
        )
    return Path(given)


def check_url(url: str) -> str:
    """A URL that checkpoints can lie at. Raises UsageError for one that cannot be, or holds a password.

    What is needed to reach it is imported, and nothing is asked.
    """
    import fsspec

    found = _URL.fullmatch(url)
    _check_secrets(found[2] if found else url.partition("://")[2])
    told = f"--checkpoints {_shown(url)}"
    if not found or "::" in url:
        raise UsageError(f"{told}: one store is to be named, as in s3://BUCKET/FOLDER.")
    kind, place = found[1].lower(), found[2].rstrip("/")
    try:
        check_path(url)
    except ValueError as error:
        raise UsageError(f"{told}: {error}.") from error
    try:
        fsspec.get_filesystem_class(kind)
    except ValueError as error:
        known = did_you_mean(kind, ["s3", "gs", "az", "sftp", "hdfs", "smb"])
        raise UsageError(f"{told}: there is no store called {kind!r}.{known}") from error
    except ImportError as error:
        raise _missing(url, error) from error
    if not place or (kind in OBJECT_STORES and place.startswith("/")):
        raise UsageError(f"{told}: no folder is named. Write {kind}://{'BUCKET/' * (kind in OBJECT_STORES)}FOLDER.")
    if kind in PACKAGES.keys() - OBJECT_STORES.keys() and not place.partition("/")[2]:
        raise UsageError(f"{told}: no folder is named. Write {kind}://HOST/FOLDER.")
    if kind == "local" and not Path(place).is_absolute():
        raise UsageError(f"{told}: after local:// comes a whole path. Write local:///PATH.")
    return f"{kind}://{place}"


class Bucket:
    """The checkpoints of one experiment, in a folder of its name below a URL.

    Raises RunError for what the store says, which may pass.
    """

    def __init__(self, url: str, experiment: str) -> None:
        import fsspec

        self.url = f"{url.rstrip('/')}/{experiment}"
        self._above, self._name = url, experiment
        self._kind = url.partition("://")[0].lower()
        self._whole = self._kind in OBJECT_STORES
        self._connection: tuple[Any, str] | None = None
        try:
            fsspec.get_filesystem_class(self._kind)
        except ImportError as error:
            raise _missing(self.url, error) from error

    def at(self, name: str) -> str:
        return f"{self.url}/{name}"

    def check(self, mark: Mark) -> bool:
        """Whether the folder is marked as the experiment's. Raises UsageError if it is another's, or of something else.

        Nothing is written.
        """
        with self._explaining():
            there = self._listed()
            if not there:
                self._check_bucket()
            if MARKER in there and self._is_marked(mark):
                return True
            begun = {name for name in there if (found := TEMPORARY.fullmatch(name)) and found[1] == MARKER}
            if there.keys() - begun:
                raise UsageError(
                    f"{self.url} is to hold the checkpoints of {mark['experiment']!r}, and holds something else. "
                    "Choose another place with --checkpoints."
                )
            return False

    def take(self, mark: Mark) -> None:
        """Mark the folder as the experiment's, where `check` allows it."""
        if not self.check(mark):
            with self._explaining():
                self._write(MARKER, lambda place: self._fs.pipe_file(place, json.dumps(mark).encode()))

    def names(self) -> dict[str, int]:
        """What lies there, and how many bytes it has."""
        with self._explaining():
            return self._listed()

    def put(self, path: Path) -> None:
        """Store a file of this machine under its name; the old one is there until the new one is."""
        with self._explaining():
            self._write(path.name, lambda place: self._fs.put_file(str(path), place))

    def fetch(self, path: Path) -> None:
        """Bring what is stored under a file's name to this machine; if nothing is, there is no such file here."""
        with self._explaining():
            path.unlink(missing_ok=True)
            self._fs.invalidate_cache()
            with suppress(FileNotFoundError), self._open(path.name) as stored:
                write_atomically(path, lambda file: file.writelines(self._chunks(stored)))

    def set_aside(self, name: str) -> str:
        """Give a damaged file another name, which is returned. What it stands for is not read."""
        with self._explaining():
            there = self._listed()
            names = (f"{name}.damaged{'' if number == 1 else f'-{number}'}" for number in itertools.count(1))
            aside = next(free for free in names if free not in there)
            with suppress(FileNotFoundError):
                self._move(f"{self._root}/{name}", f"{self._root}/{aside}")
            return aside

    def remove(self, name: str) -> None:
        with self._explaining(), suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root}/{name}")

    @property
    def _fs(self) -> Any:
        return self._reached()[0]

    @property
    def _root(self) -> str:
        return self._reached()[1]

    def _reached(self) -> tuple[Any, str]:
        """The store and the folder in it, with a connection of this bucket's own if the store has connections."""
        if self._connection is None:
            import fsspec

            fs, root = fsspec.core.url_to_fs(self._above, skip_instance_cache=True)
            self._connection = fs, f"{root.rstrip('/')}/{self._name}"  # beyond what fsspec would read in a name
        return self._connection

    def _disconnect(self) -> None:
        """Forget a connection after a failure: one that has broken stays so."""
        connection, self._connection = self._connection, None
        if connection and self._kind in SSH:
            with suppress(Exception):
                connection[0].client.close()  # else it would stay open if it has not broken

    def _check_bucket(self) -> None:
        """Where there is no bucket an object store shows nothing, as where it has nothing yet."""
        if self._kind not in BUCKETS:
            return
        bucket = self._root.strip("/").partition("/")[0]
        try:
            self._fs.info(bucket)
        except FileNotFoundError as error:
            raise UsageError(
                f"{self.url}: there is no {bucket!r} in that store. Make it first, or choose another place with "
                "--checkpoints."
            ) from error
        except Exception:  # who may use a folder need not be allowed to ask for all
            pass

    def _listed(self) -> dict[str, int]:
        self._fs.invalidate_cache()
        try:
            entries = self._fs.ls(self._root, detail=True)
        except FileNotFoundError:
            return {}
        root = self._root.strip("/")  # an object store may have an empty object in the place of a folder
        sizes = {str(entry["name"]).strip("/"): int(entry.get("size") or 0) for entry in entries}
        return {PurePosixPath(path).name: size for path, size in sizes.items() if path != root or size}

    def _is_marked(self, mark: Mark) -> bool:
        with self._open(MARKER) as file:
            content = file.read(LARGEST_TEXT + 1)
        try:
            found = fitting(_MARK, json_of(content.decode())) if len(content) <= LARGEST_TEXT else None
        except ValueError:
            found = None
        if found is None or found["experiment"] != mark["experiment"]:
            return False
        return len({found["created"], mark["created"]} - {None}) < 2

    def _open(self, name: str) -> Any:
        """A file to read, which is a file: a link may stand for any other, and a pipe never ends."""
        place = f"{self._root}/{name}"
        about = self._fs.info(place)
        ordinary = about.get("type", "file") == "file" and not about.get("islink")
        if self._kind in SSH:  # whose description is that of what a link stands for, and a pipe is a file in it
            ordinary = stat.S_ISREG(self._fs.ftp.lstat(place).st_mode)
        if not ordinary:
            raise UsageError(f"{self.at(name)} is no ordinary file, and bpf reads nothing else. Remove it.")
        return self._fs.open(place, "rb")

    def _write(self, name: str, write: Callable[[str], object]) -> None:
        place = f"{self._root}/{name}"
        if self._whole:
            write(place)
            return
        self._fs.makedirs(self._root, exist_ok=True)
        new = f"{self._root}/.{name}.{secrets.token_hex(4)}"
        try:
            write(new)
            self._move(new, place)
        except BaseException:
            with suppress(Exception):
                self._fs.rm_file(new)
            raise

    def _move(self, old: str, new: str) -> None:
        from fsspec import AbstractFileSystem

        if type(self._fs).mv is AbstractFileSystem.mv:  # which takes a * in a name for a pattern
            self._fs.cp_file(old, new)
            self._fs.rm_file(old)
            return
        try:
            self._fs.mv(old, new)
        except FileExistsError:  # some stores give no name that is taken
            self._fs.rm_file(new)
            self._fs.mv(old, new)

    def _chunks(self, file: IO[bytes]) -> Iterator[bytes]:
        while True:
            with self._explaining():  # else it would be taken for a trouble of this machine's disk
                chunk = file.read(CHUNK)
            if not chunk:
                return
            yield chunk

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Each store has its own exceptions: all are one failure here."""
        try:
            yield
        except BpfError:
            raise
        except ImportError as error:
            raise _missing(self.url, error) from error
        except Exception as error:
            self._disconnect()
            reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
            raise RunError(f"The checkpoints at {self.url} cannot be reached: {reason}.") from error


def _check_secrets(place: str) -> None:
    """Raise UsageError, without showing them, for what may be secrets in what follows a URL's first two slashes."""
    if re.match(r"[^/?]*:.*@", place, re.DOTALL):  # a password may have slashes of its own
        raise UsageError("The URL of --checkpoints holds what may be a password; keep it in the environment.")
    if "?" in place:
        raise UsageError(
            "The URL of --checkpoints has a question mark. Leave out what follows it: secrets and settings of the "
            "store are kept in the environment."
        )


def _missing(url: str, error: ImportError) -> UsageError:
    package = PACKAGES.get(url.partition("://")[0].lower())
    cure = f"pip install {package}" if package else str(error)
    return UsageError(f"--checkpoints {_shown(url)} needs another library: {cure}")


def _shown(text: str) -> str:
    return text if is_plain(text) else repr(text)

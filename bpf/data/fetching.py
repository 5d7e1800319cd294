"""Raw files of the sets that torchvision knows: find them, else unpack them, else download them."""

import contextlib
import io
import shutil
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from bpf.data.base import DISK_ERRORS, Arrays, Dataset, disk_error
from bpf.data.store import locked
from bpf.errors import BpfError, UsageError

_NETWORK_TIMEOUT = 30  # seconds without a byte; torchvision itself would wait for ever


class TorchvisionSet(Dataset):
    """What the sets share: find, else unpack or download, then read."""

    torchvision_class: ClassVar[str]
    folder: ClassVar[str]  # under data_dir
    raw: ClassVar[tuple[str, ...]]  # what torchvision reads, under `folder`
    archives: ClassVar[tuple[str, ...]]  # what torchvision downloads, under data_dir

    def present(self) -> bool:
        return self._unpacked() or all((self.data_dir / archive).is_file() for archive in self.archives)

    def instructions(self) -> str:
        by_folder: dict[Path, list[str]] = {}
        for archive in map(Path, self.archives):
            by_folder.setdefault(self.data_dir / archive.parent, []).append(archive.name)
        places = "; ".join(f"{', '.join(names)} into {folder}" for folder, names in by_folder.items())
        return f"To need no download, put {places}."

    def fingerprint(self) -> str:
        return "1"

    def read(self) -> Arrays:
        """Read the set, after unpacking or downloading it where needed.

        Raises UsageError where there is no network or the files are damaged, RunError for a full disk.
        """
        if not self._unpacked():
            self._fetch()
        try:
            with warnings.catch_warnings():  # old pickles make NumPy warn
                warnings.simplefilter("ignore")
                return self._read()
        except (BpfError, MemoryError):
            raise
        except Exception as error:  # assertions, index, unpickling and decoding errors: all mean bad bytes
            raise UsageError(
                f"The files of {self.torchvision_class} in {self.data_dir / self.folder} are damaged or "
                f"incomplete ({_reason(error)}). Delete that directory to have them fetched again. "
                f"{self.instructions()}"
            ) from error

    def _read(self) -> Arrays:
        raise NotImplementedError

    def _unpacked(self) -> bool:
        return all((self.data_dir / self.folder / name).exists() for name in self.raw)

    def _torchvision(self, root: Path, **options: Any) -> Any:
        import torchvision.datasets

        return getattr(torchvision.datasets, self.torchvision_class)(root=str(root), **options)

    def _fetch(self) -> None:
        """Unpack or download into a staging directory, then move: a killed process leaves no half a set."""
        stage = self.data_dir / f".bpf-{self.torchvision_class}"
        try:
            with locked(self.data_dir / f"{stage.name}.lock"):
                shutil.rmtree(stage, ignore_errors=True)  # of a killed process: the lock is ours
                if not self._unpacked():  # another process may have done it while this one waited
                    self._fetch_into(stage)
        except OSError as error:
            cure = "Choose another place with --data-dir."
            raise disk_error(error, f"unpack {self.torchvision_class}", self.data_dir, cure) from error

    def _fetch_into(self, stage: Path) -> None:
        suspects: list[Path] = []
        try:
            stage.mkdir()
            suspects = self._stage_archives(stage)
            with _quiet(), _timeout():
                self._torchvision(stage, download=True)
            self._keep(stage)
        except Exception as error:  # URLError, HTTPException, RuntimeError, archive errors, by version
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            there = ", ".join(map(str, suspects))
            damaged = f" {there} cannot be used: damaged or not the official file." if there else ""
            raise UsageError(
                f"{self.torchvision_class} cannot be downloaded ({_reason(error)}).{damaged} {self.instructions()}"
            ) from error
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def _stage_archives(self, stage: Path) -> list[Path]:
        """Offer local archives to torchvision; returns those that are to blame if it wants others."""
        there = [name for name in self.archives if (self.data_dir / name).is_file()]
        for name in there:
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            (stage / name).symlink_to((self.data_dir / name).resolve())
        return [self.data_dir / name for name in there]

    def _keep(self, stage: Path) -> None:
        for name in (*(f"{self.folder}/{raw}" for raw in self.raw), *self.archives):
            if (stage / name).exists() and not (stage / name).is_symlink():
                (self.data_dir / name).parent.mkdir(parents=True, exist_ok=True)
                (stage / name).replace(self.data_dir / name)


def _reason(error: BaseException) -> str:
    """The error in one line; torchvision lists every mirror it tried."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Swallow torchvision's progress bars, which would tear the console's live display."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _timeout() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_NETWORK_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)

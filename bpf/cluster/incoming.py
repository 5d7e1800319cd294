"""Files that come in parts: each is in its place when all of it is, as with `write_atomically`."""

import hashlib
import os
import secrets
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from bpf.errors import RunError
from bpf.files import explaining, sync_directory


@dataclass
class _Arriving:
    sender: str
    path: Path
    file: IO[bytes]
    digest: Any = field(default_factory=hashlib.sha256)

    def drop(self) -> None:
        with suppress(OSError):  # of no more use, and no reason to fail
            self.file.close()
            self.path.unlink(missing_ok=True)


class Incoming:
    """The files that are on their way, by their uploads: two senders of one file do not disturb each other.

    Several threads may use it.
    """

    def __init__(self) -> None:
        self._arriving: dict[str, _Arriving] = {}
        self._lock = threading.Lock()

    def receive(self, sender: str, path: Path, upload: str, at: int, digest: str | None, part: bytes) -> None:
        """The next bytes of a file, from `at` on; with the SHA-256 of all of it they are its last.

        Raises RunError for parts that do not belong together, and DiskFull.
        """
        with explaining(path):
            with self._lock:
                arriving = self._arriving.pop(upload, None)
            if at == 0:
                if arriving is not None:
                    arriving.drop()
                self.drop(sender)  # it sends one at a time
                path.parent.mkdir(parents=True, exist_ok=True)
                new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
                arriving = _Arriving(sender, new, new.open("xb"))
            if arriving is None:
                raise RunError(f"{path} came in parts of which some are missing.")
            try:
                if arriving.file.tell() != at:
                    raise RunError(f"{path} came in parts that do not belong together.")
                arriving.file.write(part)
                arriving.digest.update(part)
                if digest is not None:
                    self._put(arriving, path, digest)
                    return
            except BaseException:
                arriving.drop()
                raise
            with self._lock:
                self._arriving[upload] = arriving

    def drop(self, sender: str) -> None:
        """Forget what a sender has begun and will not go on with."""
        with self._lock:
            left = [self._arriving.pop(upload) for upload, one in list(self._arriving.items()) if one.sender == sender]
        for arriving in left:
            arriving.drop()

    def close(self) -> None:
        with self._lock:
            left, self._arriving = list(self._arriving.values()), {}
        for arriving in left:
            arriving.drop()

    def _put(self, arriving: _Arriving, path: Path, digest: str) -> None:
        if arriving.digest.hexdigest() != digest:
            raise RunError(f"{path} came with other bytes than it left.")
        arriving.file.flush()
        os.fsync(arriving.file.fileno())
        arriving.file.close()
        arriving.path.replace(path)
        sync_directory(path.parent)

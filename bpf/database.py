"""The database file of a study: where SQLite may keep it, and how its transactions take their turn."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from bpf.errors import UsageError

BUSY_SECONDS = 60.0
_NETWORK_FILE_SYSTEMS = {"afs", "beegfs", "ceph", "cifs", "gpfs", "lustre", "nfs", "nfs4", "smb3", "smbfs"}
ENGINE_URL = "sqlite:///study.db"  # only its kind counts, see `engine_options`


def database_path(where: str | Path) -> Path:
    """The SQLite file that is meant, with its whole path, so that a later `chdir` does no harm."""
    if isinstance(where, str) and "://" in where:
        kind, where = where.split("://", 1)
        if kind != "sqlite":
            raise UsageError(f"A study is kept in an SQLite file so far, not in {kind!r}; give its path.")
        where = where.removeprefix("/")
    path = Path(where).resolve()
    if path.is_dir():
        raise UsageError(f"{path} is a directory; the study is a file in it, such as {path / 'study.db'}.")
    return path


def engine_options(path: Path) -> dict[str, Any]:
    """One connection, which begins no transaction by itself and waits for its turn to write.

    It is opened here and not from a URL, as a path may hold what a URL may not.
    """

    def open_file() -> sqlite3.Connection:
        connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA synchronous=NORMAL")  # with WAL, a power cut may lose the last second only
        return connection

    return {"pool_size": 1, "creator": open_file}


def connect(path: Path) -> sa.Engine:
    """The engine of our tables: its transactions take SQLite's write lock at once, unless only reading.

    One that reads first and writes later can lose the race for the lock half-way.
    """
    engine = sa.create_engine(ENGINE_URL, **engine_options(path))

    @sa.event.listens_for(engine, "begin")
    def lock_at_once(connection: sa.Connection) -> None:
        if not connection.get_execution_options().get("bpf_reading"):
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def prepare(path: Path) -> None:
    """Make the file, with a write-ahead log (the file remembers it), where SQLite's locks can be trusted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = _file_system(path.parent, Path("/proc/self/mounts"))
    if kind in _NETWORK_FILE_SYSTEMS:
        raise UsageError(
            f"{path} is on a network file system ({kind}), where SQLite cannot lock reliably; "
            "keep the experiment on a local disk."
        )
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")


def _file_system(directory: Path, mounts: Path) -> str | None:
    """The type of file system that holds the directory, where the system tells (Linux)."""
    try:
        entries = [line.split(" ") for line in mounts.read_text().splitlines()]
    except OSError:
        return None
    around = {str(directory), *map(str, directory.parents)}
    holding = [(len(entry[1]), at, entry[2]) for at, entry in enumerate(entries) if entry[1] in around]
    return max(holding)[2] if holding else None  # the innermost mount; of several there, the last

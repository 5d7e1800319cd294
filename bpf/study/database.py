"""Where a study is kept, SQLite or PostgreSQL: how its transactions take their turn, and what its failures mean."""

import errno
import hashlib
import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from filelock import FileLock

from bpf.errors import Damaged, UsageError, did_you_mean
from bpf.files import exists, is_dir
from bpf.reading import open_regular

BUSY_SECONDS = 60.0
IDLE_SECONDS = 30
"""A process that is stopped inside a transaction loses it after this time, so that the others go on (PostgreSQL)."""
_NETWORK_FILE_SYSTEMS = {
    *("afs", "beegfs", "ceph", "cifs", "fuse.sshfs", "gpfs", "lustre", "nfs", "nfs4", "smb3", "smbfs")
}
_NAMES_ANOTHER = bytes.fromhex("d9d505f920a163d7")
_TABLES = {
    *("bpf_experiment", "bpf_rules", "bpf_cells", "bpf_histories", "bpf_owners", "alembic_version", "version_info"),
    *("studies", "study_directions", "study_user_attributes", "study_system_attributes", "trials", "trial_params"),
    *("trial_values", "trial_intermediate_values", "trial_heartbeats", "trial_user_attributes"),
    *("trial_system_attributes", "sqlite_sequence", "sqlite_stat1"),
}
"""Those of bpf and of Optuna."""
_SILENCE = logging.NullHandler()
_SECRETS = ("password", "sslpassword")
_NO_PATH = re.compile(
    r"^[a-z][a-z0-9+.-]+(:|//)|(^|\s)(host|hostaddr|port|dbname|user|password|service|sslmode)\s*=", re.IGNORECASE
)
"""What is meant as a URL, such as `postgresql:/host`, or for libpq, such as `host=db password=...`."""
_DISK_FULL = {"database or disk is full", "disk I/O error", os.strerror(errno.ENOSPC), os.strerror(errno.EFBIG)}


class LostConnection(Exception):
    """The server is gone in the middle of a transaction. Optuna tries again what SQLAlchemy's own errors tell it."""


@dataclass(frozen=True)
class Database:
    """A place for studies. `url` may hold a password; `str()` and `public` never do."""

    url: sa.URL

    @classmethod
    def at(cls, where: "str | Path | Database") -> "Database":
        """The database that is meant by a path, an `sqlite:///` URL or a `postgresql://` URL."""
        if isinstance(where, Database):
            return where
        if isinstance(where, Path):
            return cls._file(where)
        if "://" not in where:
            if _NO_PATH.search(where):  # it may hold a password, so it is not shown
                raise UsageError(
                    "The storage is neither a path nor a URL: a server is given as postgresql://USER@HOST/DATABASE, a "
                    "file as sqlite:///PATH."
                )
            return cls._file(Path(where))
        kind, _, rest = where.partition("://")
        if kind.partition("+")[0] == "sqlite":
            return cls._file(Path(rest.removeprefix("/")))
        if kind.partition("+")[0] not in ("postgresql", "postgres"):
            raise UsageError(
                f"A study is kept in SQLite or PostgreSQL, not in {kind!r}: give a path, sqlite:///PATH or "
                f"postgresql://USER@HOST/DATABASE.{did_you_mean(kind, ['postgresql', 'sqlite'])}"
            )
        try:
            url = sa.make_url(f"postgresql+psycopg://{rest}")
        except (sa.exc.ArgumentError, ValueError):
            raise UsageError(
                "The storage URL cannot be read; it is written postgresql://USER@HOST:PORT/DATABASE."
            ) from None
        if not url.database:
            raise UsageError(f"The storage URL {cls(url)} names no database; add /NAME to it.")
        return cls(url)

    @classmethod
    def _file(cls, path: Path) -> "Database":
        path = Path(os.path.realpath(path))  # so that a later `chdir` does no harm; a link to itself is none
        if is_dir(path):
            raise UsageError(f"{path} is a directory; the study is a file in it, such as {path / 'study.db'}.")
        return cls(sa.URL.create("sqlite", database=str(path)))

    @cached_property
    def path(self) -> Path | None:
        """The SQLite file, or None for a server."""
        return Path(self.url.database or "") if self.url.drivername == "sqlite" else None

    @cached_property
    def public(self) -> str:
        """The path or the URL without any password: what may be printed, logged and kept."""
        if self.path:
            return str(self.path)
        # Not `set(password=None)`, which leaves the password as it is.
        bare = sa.URL.create("postgresql", self.url.username, None, self.url.host, self.url.port, self.url.database)
        query = {name: value for name, value in self.url.query.items() if name.lower() not in _SECRETS}
        return bare.set(query=query).render_as_string(hide_password=False)

    def __str__(self) -> str:
        return self.public

    def __repr__(self) -> str:
        return f"Database({self.public!r})"

    def missing(self) -> bool:
        """Whether there is no such file; of a server only a connection can tell."""
        return self.path is not None and not exists(self.path)

    def engine_options(self, reading: bool = False) -> dict[str, Any]:
        """Few connections, of which none waits for ever and none begins a transaction by itself.

        They are opened here and not from a URL, as a path may hold what a URL may not, and nobody else needs to
        see a password.
        """
        if self.path:
            return {"pool_size": 1, "creator": partial(_open_file, self.path, reading)}
        # The second one, for a lease that is renewed during a step, is closed at once: a server has few to give.
        return {"pool_size": 1, "max_overflow": 1, "creator": partial(_open_server, self.url)}

    @property
    def engine_url(self) -> str:
        """The kind of engine that `engine_options` are for."""
        return "sqlite:///study.db" if self.path else "postgresql+psycopg://"

    def connect(self, reading: bool = False) -> sa.Engine:
        """The engine of our tables: its transactions take SQLite's write lock at once, unless only reading.

        One that reads first and writes later can lose the race for the lock half-way. With `reading` nothing need
        be writable.
        """
        try:
            engine = sa.create_engine(self.engine_url, **self.engine_options(reading))
        except ImportError:
            raise UsageError("PostgreSQL needs psycopg: pip install 'bpf[postgres]'") from None

        if self.path:

            @sa.event.listens_for(engine, "begin")
            def lock_at_once(connection: sa.Connection) -> None:
                if not connection.get_execution_options().get("bpf_reading"):
                    connection.exec_driver_sql("BEGIN IMMEDIATE")

        @sa.event.listens_for(engine, "handle_error")
        def end_at_once(context: sa.engine.ExceptionContext) -> None:
            if context.is_disconnect:
                raise LostConnection

        return engine

    def take_turn(self, connection: sa.Connection, experiment: str) -> None:
        """Let one transaction at a time change an experiment, on PostgreSQL as on SQLite.

        So a claim sees whole cohorts, and there is one way to think about both.
        """
        if self.path is None:
            number = int.from_bytes(hashlib.sha256(f"bpf/{experiment}".encode()).digest()[:8], "big", signed=True)
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(number)))

    @contextmanager
    def alone(self, locks: Path) -> Iterator[None]:
        """Let one process at a time make tables."""
        if self.path:
            locks.mkdir(parents=True, exist_ok=True)
            with FileLock(locks / "making-tables"):
                yield
            return
        engine = self.connect()
        try:
            with engine.begin() as connection:
                self.take_turn(connection, "")
                yield
        finally:
            engine.dispose()

    def check_foreign(self) -> None:
        """Raise UsageError for a file of another program: neither bpf's tables nor Optuna's are in it, but others."""
        if self.path is None or not exists(self.path):
            return
        with closing(_open_file(self.path, True)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables - _TABLES or (tables and not tables & {"bpf_experiment", "version_info"}):
            raise UsageError(f"{self.path} is a database of something else. Choose another file.")

    def prepare(self) -> None:
        """Make the file, with a write-ahead log (the file remembers it), where SQLite's locks can be trusted."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kind = _file_system(self.path.parent, Path("/proc/self/mounts"))
        if kind in _NETWORK_FILE_SYSTEMS:
            raise UsageError(
                f"{self.path} is on a network file system ({kind}), where SQLite cannot lock reliably; "
                "keep the experiment on a local disk, or its study on a server with "
                "--storage postgresql://USER@HOST/DATABASE."
            )
        self.check_foreign()
        check_journal(self.path)
        with closing(sqlite3.connect(self.path, timeout=BUSY_SECONDS)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")


def check_journal(path: Path) -> None:
    """Raise Damaged for a rollback journal beside a database that names another file, which SQLite would delete.

    Journals of transactions over several databases end so. bpf's databases are alone, and have a write-ahead log.
    """
    journal = path.with_name(f"{path.name}-journal")
    with suppress(OSError), open_regular(journal) as file:
        file.seek(-len(_NAMES_ANOTHER), os.SEEK_END)
        if file.read() == _NAMES_ANOTHER:
            raise Damaged(journal, "it names another file, which opening the database would remove", "Move it away.")


def _open_file(path: Path, reading: bool) -> sqlite3.Connection:
    check_journal(path)
    options: dict[str, Any] = {"timeout": BUSY_SECONDS, "isolation_level": None, "check_same_thread": False}
    if reading and not os.access(path.parent, os.W_OK):  # where even a reader could not make its own files
        live = path.with_name(f"{path.name}-shm").exists()
        read_only: sqlite3.Connection = sqlite3.connect(
            f"{path.as_uri()}?{'mode=ro' if live else 'immutable=1'}", uri=True, **options
        )
        return read_only
    connection: sqlite3.Connection = sqlite3.connect(path, **options)
    connection.execute("PRAGMA synchronous=NORMAL")  # with WAL, a power cut may lose the last second only
    return connection


def _open_server(url: sa.URL) -> Any:
    import psycopg

    # What they say of a connection that is lost follows as an error; for who asks for their log it is still there.
    for library in ("psycopg", "sqlalchemy"):
        logging.getLogger(library).addHandler(_SILENCE)
    options = f"-c idle_in_transaction_session_timeout={IDLE_SECONDS}s"
    defaults = {"connect_timeout": 10, "tcp_user_timeout": 30_000, "application_name": "bpf", "options": options}
    given = url.get_dialect()().create_connect_args(url)[1]
    return psycopg.connect(**{**defaults, **given})


def cause(error: BaseException) -> str:
    """What the database said, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error.strerror if isinstance(error, OSError) else error).strip()
    return text.partition("\n")[0]


def disk_is_full(error: BaseException) -> bool:
    original = _original(error)
    return cause(error) in _DISK_FULL or getattr(original, "sqlstate", None) == "53100"


def corrupt(error: BaseException) -> bool:
    """Whether an SQLite file is none, or damaged."""
    return getattr(_original(error), "sqlite_errorcode", None) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def passes(error: BaseException) -> bool:
    """Whether a failure is one that time mends: a lock, a server that restarts, a lost connection, a full disk."""
    original = _original(error)
    if disk_is_full(error):
        return True
    if isinstance(original, sqlite3.OperationalError):
        return "locked" in str(original) or "busy" in str(original)
    state = getattr(original, "sqlstate", None)
    if state is not None:  # connection, shutdown, resources, deadlock, serialization, idle too long
        return state[:2] in ("08", "53", "57") or state in ("40001", "40P01", "25P03")
    return type(original).__module__.startswith("psycopg") and isinstance(original, _psycopg_errors())


def _psycopg_errors() -> tuple[type[BaseException], ...]:
    import psycopg

    return (psycopg.OperationalError, psycopg.InterfaceError)


def _original(error: BaseException) -> BaseException:
    """The driver's own error under what SQLAlchemy and Optuna have made of it."""
    while True:
        inner = getattr(error, "orig", None) or error.__cause__
        if not isinstance(inner, BaseException):
            return error
        error = inner


def _file_system(directory: Path, mounts: Path) -> str | None:
    """The type of file system that holds the directory, where the system tells (Linux)."""
    try:
        entries = [line.split(" ") for line in mounts.read_text().splitlines()]
    except OSError:
        return None
    around = {str(directory), *map(str, directory.parents)}
    holding = [(len(entry[1]), at, entry[2]) for at, entry in enumerate(entries) if entry[1] in around]
    return max(holding)[2] if holding else None  # the innermost mount; of several there, the last

"""Who owns cells: a file lock that lives exactly as long as its process, and between machines a lease.

On one machine a lock that can be taken means that its owner is dead, at once and however it died, without
heartbeats and without a grace period. On a server's database an owner also renews a lease, in the server's own
time; on another machine, where its lock cannot be seen, it counts as dead when the lease has run out.
"""

import math
import os
import re
import secrets
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from weakref import WeakValueDictionary

import sqlalchemy as sa
from filelock import FileLock
from pydantic import TypeAdapter, ValidationError

from bpf.locks import is_held
from bpf.reading import json_of
from bpf.study import stored
from bpf.study.holder import Holder, Spent
from bpf.study.schema import cells, owners

_SPENT: TypeAdapter[float] = TypeAdapter(Spent)
_LOCK = re.compile(r"[0-9a-f]{16}\.lock")
LEASE_SECONDS = 60.0
RENEW_SECONDS = 15.0


class Owner(Holder):
    """A holder that is known as alive by a lock file in `locks`, for as long as this process lives.

    `pid` is the process that trains, if it is another one.
    """

    def __init__(self, locks: Path, facts: dict[str, Any] | None = None, pid: int | None = None) -> None:
        locks.mkdir(parents=True, exist_ok=True)
        super().__init__(secrets.token_hex(8), facts)
        self.lock = locks / f"{self.token}.lock"
        self._process = os.getpid()
        self.pid = self._process if pid is None else pid
        self._lock = FileLock(self.lock, thread_local=False)
        self._lock.acquire()
        _own[self.lock] = self

    def close(self) -> None:
        """Let go. Cells that were not released before count as interrupted from here on."""
        if os.getpid() == self._process:  # a forked child holds a copy of this object, not the lock
            _own.pop(self.lock, None)
            with suppress(OSError):  # Windows removes no open file; `sweep` does it later
                self.lock.unlink(missing_ok=True)
            self._lock.release()

    @property
    def holds(self) -> bool:
        """Whether the lock is held, and by this process: a forked child has only a copy of this object."""
        return os.getpid() == self._process and self._lock.is_locked

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_own: WeakValueDictionary[Path, Owner] = WeakValueDictionary()
"""The owners that this process has made, by their locks."""


def machine() -> str:
    """This machine since it was started: where two processes see the same locks."""
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        started = f"{uuid.getnode():x}"
    return f"{socket.gethostname()}/{started}"


def sweep(locks: Path) -> None:
    """Remove the lock files of owners that have died, and nothing that is called otherwise."""
    for path in lock_files(locks):
        if is_held(path) is False:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def lock_files(locks: Path) -> list[Path]:
    """The lock files of owners in their directory, which are empty; nothing is looked for through a link."""
    found = [] if locks.is_symlink() else sorted(locks.glob("*.lock"))
    own = (path for path in found if _LOCK.fullmatch(path.name) and not path.is_symlink())
    return [path for path in own if path.is_file() and not path.stat().st_size]


def now(connection: sa.Connection) -> float:
    """Seconds since 1970 by the clock of the database, which all machines share."""
    if connection.dialect.name == "sqlite":
        return time.time()
    return float(connection.scalar(sa.select(sa.extract("epoch", sa.func.clock_timestamp()))) or 0)


def enroll(connection: sa.Connection, experiment: str, owner: Owner) -> None:
    """Make the owner known, or renew its lease; one that was declared dead gets a new token, and keeps its lock."""
    if renew(connection, experiment, owner):
        return
    if is_retired(connection, experiment, owner):
        owner.begin_anew(secrets.token_hex(8))
    moment = now(connection)
    record = {
        "experiment": experiment,
        "token": owner.token,
        "machine": machine(),
        "pid": owner.pid,
        "lock": str(owner.lock.resolve()),
        "facts": owner.facts,
        "began": moment,
        "lease": moment + LEASE_SECONDS,
    }
    connection.execute(sa.insert(owners).values(record))


def renew(connection: sa.Connection, experiment: str, owner: Owner) -> bool:
    """Whether the owner is still known as alive; its lease then begins anew."""
    mine = (owners.c.experiment == experiment, owners.c.token == owner.token, owners.c.lease > 0)
    change = sa.update(owners).where(*mine).values(lease=now(connection) + LEASE_SECONDS, facts=owner.facts)
    return connection.execute(change).rowcount == 1


def retire(connection: sa.Connection, experiment: str, token: str, facts: dict[str, Any] | None = None) -> None:
    """Note that an owner is gone, so that it learns of it if it should still live; its last `facts` are kept."""
    mine = (owners.c.experiment == experiment, owners.c.token == token)
    last = {} if facts is None else {"facts": facts}
    connection.execute(sa.update(owners).where(*mine).values(lease=0.0, **last))


def is_retired(connection: sa.Connection, experiment: str, owner: Owner) -> bool:
    """Whether the owner was declared dead; one that is not known yet was not."""
    mine = (owners.c.experiment == experiment, owners.c.token == owner.token, owners.c.lease <= 0)
    return connection.scalar(sa.select(owners.c.token).where(*mine)) is not None


def living(connection: sa.Connection, experiment: str, locks: Path, here_only: bool) -> list[dict[str, Any]]:
    """The owners that are alive: `token`, `pid`, `facts`, `began`. What they say of themselves is not checked."""
    text = sa.type_coerce(owners.c.facts, sa.Text).label("facts")
    query = sa.select(owners.c.token, owners.c.pid, owners.c.machine, owners.c.began, owners.c.lease, text)
    query = query.where(owners.c.experiment == experiment, owners.c.lease > 0)
    known = [record | {"facts": _parsed(record["facts"])} for record in map(dict, connection.execute(query).mappings())]
    alive = _judge(locks, here_only, 0.0 if here_only else now(connection), True)
    return [one for one in known if alive(stored.word(one["token"]), one["machine"], one["lease"])]


def spent(connection: sa.Connection, experiment: str) -> float | None:
    """Seconds of a device that all owners together have had, also those that are gone; None if none has noted any.

    What does not fit is left out.
    """
    found = []
    query = sa.select(sa.type_coerce(owners.c.facts, sa.Text)).where(owners.c.experiment == experiment)
    for facts in map(_parsed, connection.scalars(query)):
        if isinstance(facts, dict):
            with suppress(ValidationError):
                found.append(_SPENT.validate_python(facts.get("spent")))
    return math.fsum(found) if found else None


def _parsed(text: Any) -> Any:
    try:
        return json_of(text)
    except (TypeError, ValueError):
        return None


def _is_held(lock: Path, unknown: bool | None = True) -> bool | None:
    """As `is_held`, at once for those of this process: a driver has one for each of its cluster's workers."""
    owner = _own.get(lock)
    return True if owner is not None and owner.holds else is_held(lock, unknown)


def dead(connection: sa.Connection, experiment: str, locks: Path, here_only: bool, trust_leases: bool) -> set[str]:
    """Which of the owners of running cells have died.

    `locks` is where this machine's locks lie. With `here_only` every owner is on this machine (SQLite), and the lock
    alone decides. Otherwise it does so for owners on this machine, and for others the lease, unless leases are not to
    be trusted because the database was away.
    """
    at_work = sa.select(cells.c.owner).where(cells.c.experiment == experiment, cells.c.state == "running").distinct()
    if here_only:
        alive = _judge(locks, True, 0.0, True)
        return {token for token in map(stored.word, connection.scalars(at_work)) if not alive(token, "", 0.0)}
    moment = now(connection)
    of_cell = sa.and_(owners.c.experiment == cells.c.experiment, owners.c.token == cells.c.owner)
    # Of a thousand workers only those that may be dead: others elsewhere whose lease lasts are no matter of a claim.
    suspects = at_work.add_columns(
        sa.func.coalesce(owners.c.machine, "").label("machine"), sa.func.coalesce(owners.c.lease, 0.0).label("lease")
    )
    suspects = suspects.select_from(cells.outerjoin(owners, of_cell))
    suspects = suspects.where(sa.or_(owners.c.token.is_(None), owners.c.machine == machine(), owners.c.lease <= moment))
    alive = _judge(locks, False, moment, trust_leases)
    found = [stored.owner(one) for one in connection.execute(suspects).mappings()]
    return {one["owner"] for one in found if not alive(one["owner"], one["machine"], one["lease"])}


def _judge(locks: Path, here_only: bool, moment: float, trust_leases: bool) -> Callable[[str, str, float], bool]:
    """Whether an owner lives that has a `token`, is on a machine, and has a lease until then: see `dead`."""
    here = machine()

    def alive(token: str, where: str, lease: float) -> bool:
        # Not where the database says: whoever may write into it could name any file, and make anyone look dead.
        lock = locks / f"{token}.lock"
        if here_only:
            return bool(_is_held(lock))
        held = _is_held(lock, None) if where == here else None
        return held if held is not None else lease > moment or not trust_leases

    return alive

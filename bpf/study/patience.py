"""What a failing database means for a study: waited out and done again, or told in words.

A failure that time mends (locked, restarting, away, a full disk) is waited for by whoever has patience, and the whole
step is then done again. Everything else becomes one message.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar, cast

import sqlalchemy as sa

from bpf.errors import BpfError, Damaged, RunError, UsageError
from bpf.study.database import Database, LostConnection, cause, corrupt, disk_is_full, passes
from bpf.study.seam import FIRST_PAUSE, LONGEST_PAUSE
from bpf.study.stored import Damage

P = ParamSpec("P")
R = TypeVar("R")


class Patient(Protocol):
    """Whoever does steps on a database: how many seconds it waits, whom it tells, and what it has been through."""

    patience: float
    on_wait: Callable[[str], object]
    uncertain: bool
    """Whether the step that is done now failed before, so that it may have been done and the answer lost."""
    failed_at: float
    """When the database failed last, by `time.monotonic`."""


Someone = TypeVar("Someone", bound=Patient)


class Unreachable(UsageError):
    """The server of a study does not answer: it may be busy, or not be there at all."""


class Passing(RunError):
    """A failure of the database that time mends."""

    full = False


def patient(step: Callable[Concatenate[Someone, P], R]) -> Callable[Concatenate[Someone, P], R]:
    """Do a step again, as long as there is patience, when the database fails in a way that passes."""

    @wraps(step)
    def patiently(self: Someone, *args: P.args, **kwargs: P.kwargs) -> R:
        began, pause = time.monotonic(), FIRST_PAUSE
        self.uncertain = False
        while True:
            try:
                return step(self, *args, **kwargs)
            except Passing as failure:
                self.uncertain, self.failed_at = True, time.monotonic()
                if not self.patience or (not failure.full and time.monotonic() - began > self.patience):
                    raise RunError(str(failure)) from failure
                self.on_wait(str(failure))
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    return cast(Callable[Concatenate[Someone, P], R], patiently)


@contextmanager
def failing(database: Database) -> Iterator[None]:
    """Tell failures that pass (`Passing`) from others (RunError), in words."""
    try:
        yield
    except BpfError:
        raise
    except Damage as error:
        raise Damaged(database, str(error)) from error
    except Exception as error:
        if corrupt(error):
            raise Damaged(database, cause(error)) from error
        if not isinstance(error, sa.exc.SQLAlchemyError | LostConnection) and not type(error).__module__.startswith(
            ("optuna", "sqlite3", "psycopg")
        ):
            raise
        if not passes(error):
            raise RunError(f"The study database {database} failed: {cause(error)}.") from error
        failure = Passing(f"The study database failed: {cause(error)}.")
        failure.full = disk_is_full(error)
        raise failure from error


@contextmanager
def explained(database: Database) -> Iterator[None]:
    """What can be wrong with a database that is opened, in words for its user."""
    try:
        yield
    except BpfError:
        raise
    except Damage as error:
        raise Damaged(database, str(error)) from error
    except (sa.exc.SQLAlchemyError, LostConnection, OSError, RuntimeError, ImportError, ValueError) as error:
        raise _explanation(database, error) from error
    except Exception as error:
        if not type(error).__module__.startswith(("sqlite3", "psycopg", "optuna")):
            raise
        raise _explanation(database, error) from error


def _explanation(database: Database, error: BaseException) -> BpfError:
    if isinstance(error, RuntimeError | ImportError):  # Optuna's: its tables' version, a driver
        return UsageError(f"{database} cannot be used with this optuna: {error}")
    if corrupt(error):
        return Damaged(database, cause(error))
    if disk_is_full(error):
        return RunError(f"{database} cannot be used as a study database: {cause(error)}.")
    if database.path:
        return UsageError(f"{database} cannot be used as a study database: {cause(error)}.")
    said = cause(error).rstrip(".")
    if "password" in said or "authentication" in said:
        cure = "Check the user and the password; PGPASSWORD or ~/.pgpass keep it out of command lines."
    elif "does not exist" in said:
        cure = "Create it on the server, or check the URL."
    else:
        cure = "Check that the server runs and can be reached from here."
        return Unreachable(f"The study database {database} cannot be used: {said}. {cure}")
    return UsageError(f"The study database {database} cannot be used: {said}. {cure}")

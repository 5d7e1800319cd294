"""What bpf raises when it cannot go on; `cli/app.py` is the only place that turns these into text."""

import difflib
from collections.abc import Iterable
from pathlib import Path


class BpfError(Exception):
    """The root of every error that bpf raises on purpose.

    The message says what is wrong and what would be right, for a person, without a traceback.
    """

    exit_code = 1


class UsageError(BpfError):
    """The user can mend it: a spec, an option, a name, a file or a directory."""

    exit_code = 2


class RunError(BpfError):
    """Something failed while running: a full disk, a lost database, a rule that raised."""


class Damaged(RunError):
    """What bpf has written is not what it wrote any more: `what` (a file, or a part of one) is damaged, `why`."""

    def __init__(self, what: object, why: str, cure: str = "Put back a copy of it, or start anew elsewhere.") -> None:
        super().__init__(f"{what} is damaged: {why}. {cure}")


class PluginError(Exception):
    """A plugin has failed in training, as the message says of it by name: so fails what was trained."""


class DiskFull(RunError):
    """There is no space left to write `path`."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"The disk is full: {path} could not be written. Nothing finished is lost; free some space and give the "
            "same command again."
        )
        self.path = path


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" Did you mean 'tanh'?"` for the only name with that beginning or a close match, otherwise what is known."""
    known = sorted(known)
    begun = [name for name in known if word and name.startswith(word)]
    close = begun if len(begun) == 1 else difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(known)}." if known else ""

"""How long a test waits for what another process or thread does: until it is done, however slow the machine is."""

import time
from collections.abc import Callable
from typing import Any

SECONDS = 600.0
"""After so long it hangs: every limit in the tests is this one."""


def eventually(happened: Callable[[], Any]) -> Any:
    """What `happened` returns once that is true."""
    end = time.monotonic() + SECONDS
    while not (found := happened()):
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)
    return found

"""What both ends of a line know."""

import json
from collections.abc import Sequence
from contextlib import suppress

from bpf.study.cells import Row

PART_BYTES = 2**25
"""So much of a file goes with one question."""
REPORT_SECONDS, REPORTS_A_SECOND = 2.0, 50
"""A worker reports every two seconds, or more seldom where so many are at work that there would be too many reports."""

Answer = tuple[bytes, bytes]
"""A JSON text, and bytes of a file where some go with it."""
BUSY = b'{"busy": true}'
"""In place of an answer that is not there yet: whoever asks again is to wait."""


class Unsized(Exception):
    """How many cells like the first of `rows` are stacked is for the worker to say; the others will be asked next."""

    def __init__(self, rows: Sequence[Row]) -> None:
        super().__init__(rows[0].key)
        self.rows = rows


def kind_of(row: Row) -> str:
    """What decides how many cells like this one are stacked."""
    return f"{row.structure}/{row.max_runs or ''}"


def heading(question: bytes) -> tuple[str, int, str]:
    """The line of a question, its number there, and what it asks to do; empty if it makes no sense."""
    with suppress(Exception):
        asked = json.loads(question)
        return str(asked["line"]), int(asked["number"]), str(asked["do"])
    return "", 0, ""

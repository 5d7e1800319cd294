"""Where everything is printed: results to standard output, progress and troubles to standard error.

Names of files, classes and experiments may hold anything; control characters among them are shown, never obeyed.
"""

import re
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal acts on, what turns the direction of writing, and what is no character."""


def harmless(text: str) -> str:
    """A text with its control characters, but for ends of lines and tabs, written out: `\\x1b[2J`."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: object) -> str:
    """A name as a part of a line: also without ends of lines and tabs."""
    return harmless(str(text)).replace("\n", "\\n").replace("\t", "\\t")


class Screen(Console):
    """A rich console that writes control characters out; its own are kept apart from text."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=harmless(segment.text))


out = Screen(highlight=False, soft_wrap=False, emoji=False, markup=False)
err = Screen(stderr=True, highlight=False, emoji=False, markup=False)


def say(text: str) -> None:
    """A line that is never broken: what reads it may not be as wide as a terminal."""
    out.print(text, soft_wrap=True)


def tell(text: str) -> None:
    """A line to standard error, never broken."""
    err.print(text, soft_wrap=True)

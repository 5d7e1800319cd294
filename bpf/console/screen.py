"""Where everything is printed: results to standard output, progress and troubles to standard error."""

from rich.console import Console

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """A line that is never broken: what reads it may not be as wide as a terminal."""
    out.print(text, markup=False, soft_wrap=True)

"""The command line. The only place that turns errors into text and exit codes."""

import os
import re
import sys
import traceback
from contextlib import nullcontext
from typing import Annotated

import typer

from bpf import __version__
from bpf.cli import listing, models, plugin, published, training, viewing
from bpf.console.screen import tell
from bpf.errors import BpfError, UsageError
from bpf.interrupts import NOTHING_BEGUN, interruptible

app = typer.Typer(
    help="Train fully connected networks without backpropagation, and compare learning rules by grid search.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    rich_markup_mode="rich",
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"bpf {__version__}")
        raise typer.Exit


@app.callback()
def _bpf(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (also BPF_DEBUG=1).")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    if debug:
        os.environ["BPF_DEBUG"] = "1"


GROUPS = {
    "Train": (*training.COMMANDS, *published.COMMANDS),
    "Look at what came out": viewing.COMMANDS,
    "Use a model": models.COMMANDS,
    "List what there is": listing.COMMANDS,
    "Extend": plugin.COMMANDS,
}
for panel, commands in GROUPS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 a mistake in the request, 130 interrupted, 141 unread."""
    words = [word for word in (sys.argv[1:] if arguments is None else arguments) if not word.startswith("-")]
    trains = bool(words) and words[0] in {command.__name__ for command in GROUPS["Train"]}
    with interruptible(lambda: NOTHING_BEGUN, at_once=True) if trains else nullcontext():
        _main(arguments)


def _main(arguments: list[str] | None) -> None:
    try:
        _check_filled(sys.argv[1:] if arguments is None else arguments)
        app(args=arguments, prog_name="bpf")
    except BpfError as error:
        _fail(f"{'' if error.exit_code == 130 else 'Error: '}{error}", error.exit_code)
    except KeyboardInterrupt:
        _fail("Interrupted. Nothing finished is lost; go on with `bpf resume`.", 130)
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # which typer and rich end with 1 for
            _unread()
        raise
    except BrokenPipeError:
        _unread()
    except OSError as error:  # of the system, not of bpf
        if error.filename is None:
            _fail(f"Error: the system failed: {error.strerror or error}. Nothing finished is lost.", 1)
        _fail(f"Error: {error.filename} cannot be used: {error.strerror}. Choose another place.", 2)
    except Exception as error:  # ours, not the user's: say so, and how to see more
        _fail(
            f"bpf failed: {type(error).__name__}: {error}\nThis is a bug in bpf or a plugin; BPF_DEBUG=1 shows where.",
            1,
        )


def _check_filled(arguments: list[str]) -> None:
    """Refuse empty arguments: `""` would be the current directory where a directory is meant."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if not argument.strip() or re.fullmatch("--[a-z-]+=", argument):
            name = argument if argument.strip() else before if before.startswith("--") else "it"
            raise UsageError(f"An argument is empty: {name} needs a value, or is to be left out.")


def _unread() -> None:
    """End as a program does that SIGPIPE kills: whoever read the output, such as `head`, has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(141)


def _fail(message: str, exit_code: int) -> None:
    if os.environ.get("BPF_DEBUG"):
        traceback.print_exc()
    tell(message)
    sys.exit(exit_code)

"""Telling someone, or some program, that an experiment has finished, failed or was stopped.

Where to is a secret: the address of a web hook is its key. It is shown as `https://host/...` only.
"""

import http.client
import json
import os
import re
import shlex
import subprocess
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from bpf.errors import BpfError, UsageError
from bpf.experiment.directory import Experiment
from bpf.study.ranking import rank

EVENTS = ("finished", "failed", "stopped")
URL_SECONDS = 10.0
COMMAND_SECONDS = 60.0
OPTION = "--notify"
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+:(?://)?)\S*", re.IGNORECASE)
"""What is meant as an address and not as a command, such as `ftp://...` and `mailto:...`."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        """Follow none: what is sent would be lost on the way, as a redirected POST becomes a GET."""


def check(targets: Sequence[str]) -> None:
    """Raise UsageError, which does not quote it, for a target that cannot be told whatever happens."""
    for target in targets:
        address = _ADDRESS.fullmatch(target.strip())
        if _is_url(target):
            if problem := _problem(target):
                raise UsageError(f"{OPTION} {shown(target)} cannot be told: {problem}.")
        elif address or not target.strip():
            known = f"{address[1]}..." if address else "''"
            raise UsageError(f"{OPTION} {known} is neither a http(s) URL nor a shell command.")
        elif not _is_found(target):
            raise UsageError(
                f"{OPTION} is neither a URL, which begins with http:// or https://, nor a command that is found here."
            )


def _is_found(command: str) -> bool:
    """Whether the shell knows the program that a command starts with; where that is not plain to see, it may."""
    first = command.split()[0]
    if os.name == "nt" or not re.fullmatch(r"[\w./-]+", first):
        return True
    asked = ["/bin/sh", "-c", 'command -v -- "$1"', "sh", first]
    return subprocess.run(asked, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def _problem(url: str) -> str:
    if re.search(r"[\s\x00-\x1f\x7f]", url):
        return "a URL has no spaces"
    try:
        parts = urlsplit(url)
        if parts.hostname and parts.port != 0:
            return "a user name or a password in a URL would not be sent" if "@" in parts.netloc else ""
    except ValueError:
        pass
    return "the URL has no host, or none with a port"


@dataclass(frozen=True)
class Notifier:
    """Sends to `targets`: to a http(s) URL as the JSON body of a POST, to anything else, a shell command, on its input.

    A command also finds BPF_EVENT and BPF_EXPERIMENT in its environment. What it prints goes to standard error.
    """

    targets: Sequence[str]

    def send(self, event: str, summary: dict[str, Any]) -> list[str]:
        """Tell each target once; returns a warning for each that could not be told. Never raises."""
        told = {**summary, "event": event}
        content = json.dumps(told).encode()
        environment = {"BPF_EVENT": event, "BPF_EXPERIMENT": str(told.get("experiment", ""))}
        warnings = []
        for target in self.targets:
            problem = _post(target, content) if _is_url(target) else _run(target, content, environment)
            if problem:
                warnings.append(f"The notification to {shown(target)} failed: {problem}.")
        return warnings


def summarize(experiment: Experiment, event: str, seconds: float, message: str = "") -> dict[str, Any]:
    """What a notification says of an experiment, as JSON has it.

    `experiment` (its directory), `event` (one of `EVENTS`), `seconds` since the command began, `message`; `cells` by
    state, and the `best` cell of each rule, by rule, as `bpf best --json` shows it. These two are empty if the study
    cannot be read, which may be what there is to tell.
    """
    cells: dict[str, int] = {}
    best: dict[str, Any] = {}
    with suppress(BpfError), closing(experiment.read_study()) as study:
        cells = study.counts()
        leaders = [row for rule in study.rules() for row in study.leaders(rule, 1)]
        best = {entry.row.rule: entry.as_json(experiment.grid.objective) for entry in rank(leaders)}
    return {
        "experiment": str(experiment.directory),
        "event": event,
        "message": message,
        "seconds": round(seconds, 3),
        "cells": cells,
        "best": best,
    }


def shown(target: str) -> str:
    """A target without its secrets: `https://host/...`, or the name of the program that a command starts with."""
    if _is_url(target):
        try:
            url = urlsplit(target)
            host = f"{url.hostname}:{url.port}" if url.port else url.hostname
        except ValueError:
            host = ""
        return f"{target.partition(':')[0].lower()}://{host or ''}/..."
    try:
        words = shlex.split(target)
    except ValueError:
        words = target.split()
    program = next((word for word in words if "=" not in word and "://" not in word), "")
    return f"{program} ..." if words[1:] else program


def hidden(command: Sequence[str]) -> list[str]:
    """A bpf command line in which each target is as it may be shown: this is what an experiment remembers."""
    safe: list[str] = []
    for word in command:
        option, equals, target = word.partition("=")
        if safe and safe[-1] == OPTION:
            safe.append(shown(word))
        elif option == OPTION and equals:
            safe.append(f"{OPTION}={shown(target)}")
        else:
            safe.append(word)
    return safe


def _is_url(target: str) -> bool:
    return target.lower().startswith(("http://", "https://"))


def _post(url: str, content: bytes) -> str:
    """Send, and return what went wrong. Errors are not quoted where they may quote the URL."""
    try:
        request = urllib.request.Request(url, content, {"Content-Type": "application/json", "User-Agent": "bpf"})
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=URL_SECONDS):
            return ""
    except urllib.error.HTTPError as error:
        with error:
            return f"the server answered {error.code} {error.reason}"
    except TimeoutError:
        return f"no answer within {URL_SECONDS:g} s"
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            return f"no answer within {URL_SECONDS:g} s"
        return str(getattr(error.reason, "strerror", None) or "the server cannot be reached")
    except (OSError, ValueError, http.client.HTTPException) as error:
        return type(error).__name__


def _run(command: str, content: bytes, environment: dict[str, str]) -> str:
    """Run, and return what went wrong."""
    try:
        done = subprocess.run(
            command, shell=True, input=content, stdout=2, env=os.environ | environment, timeout=COMMAND_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"it did not end within {COMMAND_SECONDS:g} s"
    except (OSError, ValueError) as error:
        return type(error).__name__
    return f"it ended with exit code {done.returncode}" if done.returncode else ""

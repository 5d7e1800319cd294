"""What an experiment's numbers depend on besides its spec: versions, source code, the machine, a few variables."""

import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from bpf import __version__
from bpf.errors import UsageError
from bpf.machine import memory_bytes
from bpf.registry import Plugin

PACKAGE = Path(__file__).parent.parent
LIBRARIES = ("torch", "torchvision", "optuna", "numpy", "sqlalchemy")
VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID")
GIT_SECONDS = 5.0
_FILTER = re.compile(r"filter\..*\.(clean|smudge|process|required)", re.DOTALL | re.IGNORECASE)
_GIT_PLACES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
_GIB = 2**30

# An @ that should have been percent-encoded is taken for a part of the password, as long as no query has begun.
_IN_AUTHORITY = re.compile(r"(://(?!/)[^:?]*:)[^@]*(?:@(?:[^?]|\?(?!\w+=))*)?(?=@)")
_IN_QUERY = re.compile(r"([?&][^?&=]*=).*?(?=&[^&=]+=|\Z)", re.DOTALL)
_BEFORE_LAST_AT = re.compile(r"(://).*(?=@)", re.DOTALL)
_HIDDEN = r"\1***"


def provenance(plugins: Iterable[Plugin]) -> dict[str, Any]:
    """Versions, git states, hardware and environment, as values that YAML and JSON can hold; what is unknown is None.

    `plugins` are those whose distributions matter. Imports neither torch nor any other library that it names.
    """
    return {
        "versions": _versions(plugins),
        "git": _repository(Path()),
        "bpf_git": _repository(PACKAGE) if _is_checkout(PACKAGE) else None,
        "hardware": {
            "host": platform.node(),
            "system": platform.platform(),
            "cpu": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gib": _memory(),
            "gpus": _gpus(),
        },
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def redacted(command: Sequence[str]) -> str:
    """A command line, quoted for a shell, with `***` for the passwords in its URLs."""
    return shlex.join(_redact(argument) for argument in command)


def _redact(argument: str) -> str:
    found = re.search(r"[\w+]*://", argument)
    return argument[: found.start()] + _redact_url(argument[found.start() :]) if found else argument


def _redact_url(url: str) -> str:
    from sqlalchemy.engine import make_url  # only commands with a URL need it, and `bpf --help` must start fast
    from sqlalchemy.exc import ArgumentError

    hidden = _IN_QUERY.sub(_without_secret, _IN_AUTHORITY.sub(_HIDDEN, url, count=1))
    try:
        make_url(url)
    except (ArgumentError, ValueError):
        return _BEFORE_LAST_AT.sub(_HIDDEN, hidden)
    return hidden


def _without_secret(found: re.Match[str]) -> str:
    """A value of a query, hidden if its name, however it is encoded, is that of a password."""
    return f"{found[1]}***" if re.search(r"passw(or)?d|pwd", unquote(found[1]), re.IGNORECASE) else found[0]


def _versions(plugins: Iterable[Plugin]) -> dict[str, str | None]:
    versions: dict[str, str | None] = {"bpf": __version__, "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            versions[library] = None
    others = {plugin.distribution: plugin.version for plugin in plugins if plugin.distribution != "bpf"}
    return versions | dict(sorted(others.items()))


def changed_plugins(versions: Mapping[str, str | None]) -> str:
    """In words, which plugins have changed since these versions were noted."""
    changes = []
    for name in sorted(versions.keys() - {"bpf", "python", *LIBRARIES}):
        try:
            if (now := metadata.version(name)) != versions[name]:
                changes.append(f"{name} {versions[name]} has become {now}")
        except metadata.PackageNotFoundError:
            if versions[name]:
                changes.append(f"{name} {versions[name]} has been uninstalled")
    return " and ".join(changes)


@contextmanager
def naming_versions(directory: Path) -> Iterator[None]:
    """Add to an error of the request which plugins have changed since the last start of what is there."""
    try:
        yield
    except UsageError as error:
        from bpf.experiment.file import read

        path = directory / "experiment.yaml"
        sessions = read(path).sessions if path.is_file() else []
        if sessions and (changes := changed_plugins(sessions[-1].get("versions", {}))) and changes not in str(error):
            error.args = (f"{error} Since the last start here {changes}; if that is why, install what it was.",)
        raise


def _repository(directory: Path) -> dict[str, Any] | None:
    """Root, commit, branch and changes of the repository around a directory.

    Only tracked files count as changed, as in `git describe --dirty`: experiments lie untracked in many
    working directories, and data sets take long to look through.
    """
    text = _git(directory, "status", "--porcelain=v2", "--branch", "--untracked-files=no", "--ignore-submodules=dirty")
    if text is None:
        return None
    lines = text.splitlines()
    head = dict(line.split(" ", 2)[1:] for line in lines if line.startswith("# "))
    commit, branch = head.get("branch.oid"), head.get("branch.head")
    changed = sum(not line.startswith("#") for line in lines)
    root = _git(directory, "rev-parse", "--show-toplevel")
    return {
        "root": root.strip() if root else None,
        "commit": None if commit == "(initial)" else commit,
        "branch": None if branch == "(detached)" else branch,
        "dirty": changed > 0,
        "changed_files": changed,
    }


def _is_checkout(package: Path) -> bool:
    """Whether git tracks the package; one in a virtual environment inside some repository is not tracked there."""
    return _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None


def _git(directory: Path, *arguments: str) -> str | None:
    """What git prints in a directory, or None if it cannot say. It runs no program that the repository asks for."""
    own = _run_git(directory, "config", "--local", "--includes", "--name-only", "--list", "-z") or ""
    filters = [name for name in own.split("\0") if _FILTER.fullmatch(name)]
    settings = ["core.fsmonitor=false", f"core.hooksPath={os.devnull}", *(f"{name}=" for name in filters)]
    return _run_git(directory, *(word for setting in settings for word in ("-c", setting)), *arguments)


def _run_git(directory: Path, *arguments: str) -> str | None:
    # A git hook sets these, and then git would look at the hook's repository wherever it is called.
    environment = {name: value for name, value in os.environ.items() if name not in _GIT_PLACES}
    try:
        return subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            timeout=GIT_SECONDS,
            encoding="utf-8",
            errors="replace",
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _memory() -> float | None:
    memory = memory_bytes()
    return round(memory / _GIB, 1) if math.isfinite(memory) else None


def _gpus() -> list[dict[str, Any]]:
    torch = sys.modules.get("torch")
    try:
        if torch is None or not torch.cuda.is_available():
            return []
        found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    except RuntimeError:  # a GPU that fails must not stop those who train on the CPU
        return []
    return [{"name": gpu.name, "memory_gib": round(gpu.total_memory / _GIB, 1)} for gpu in found]

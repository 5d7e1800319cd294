"""Spec files in YAML, TOML or JSON."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from bpf.errors import UsageError


def read_spec(path: Path) -> dict[str, Any]:
    """The settings in a file, unvalidated.

    Raises UsageError if it cannot be read, is not valid in the format of its suffix, or holds no settings.
    """
    readers: dict[str, Callable[[str], Any]] = {
        ".yaml": yaml.safe_load,
        ".yml": yaml.safe_load,
        ".toml": tomllib.loads,
        ".json": json.loads,
    }
    if path.suffix not in readers:
        raise UsageError(f"The spec file {path} must end in .yaml, .yml, .toml or .json.")
    try:
        content = readers[path.suffix](path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"The spec file {path} cannot be read: {error.strerror}.") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"The spec file {path} is not valid {path.suffix[1:].upper()}: {_reason(error)}.") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UsageError(f"The spec file {path} must hold settings by name, such as `dataset: digits`.")
    return content


def _reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"{error.problem} (at line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1})"
    return "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split()).rstrip(".")

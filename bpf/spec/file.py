"""Spec files in YAML, TOML or JSON."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bpf.errors import UsageError
from bpf.reading import json_of, text_of, yaml_of


def read_spec(path: Path) -> dict[str, Any]:
    """The settings in a file, unvalidated.

    Raises UsageError if it cannot be read, is not valid in the format of its suffix, or holds no settings.
    """
    readers: dict[str, Callable[[str], Any]] = {
        ".yaml": yaml_of,
        ".yml": yaml_of,
        ".toml": tomllib.loads,
        ".json": json_of,
    }
    if path.suffix not in readers:
        raise UsageError(f"The spec file {path} must end in .yaml, .yml, .toml or .json.")
    try:
        content = readers[path.suffix](text_of(path, "utf-8-sig"))
    except OSError as error:
        raise UsageError(f"The spec file {path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error).rstrip(".")
        raise UsageError(f"The spec file {path} is not valid {path.suffix[1:].upper()}: {reason}.") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UsageError(f"The spec file {path} must hold settings by name, such as `dataset: digits`.")
    return content

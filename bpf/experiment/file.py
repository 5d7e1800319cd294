"""`experiment.yaml`: what makes a directory an experiment, read with suspicion."""

from pathlib import Path
from typing import Any

import yaml

from bpf.errors import UsageError

FORMAT = 2
OLDER_FORMAT = 1
_CONTENT = {"kind": str, "name": str, "created": str, "sessions": list, "data_dir": str, "spec": dict}


def read(path: Path) -> dict[str, Any]:
    """Its content, that of bpf 0.1 in this format. Raises UsageError for anything that bpf did not write."""
    damaged = f"{path} is damaged: it is not the file that bpf wrote"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{damaged} ({type(error).__name__}).") from error
    if not isinstance(content, dict) or "format" not in content:
        raise UsageError(f"{damaged}.")
    if content["format"] == OLDER_FORMAT and isinstance(content.get("commands"), list):
        content["sessions"] = [{"command": command} for command in content["commands"]]
        if content["sessions"]:
            content["sessions"][-1]["versions"] = content.get("versions", {})
    elif content["format"] != FORMAT:
        raise UsageError(f"{path} is of format {content['format']}; this bpf reads format {FORMAT}.")
    wrong = [name for name, kind in _CONTENT.items() if not isinstance(content.get(name), kind)]
    if wrong or content["kind"] not in ("tune", "train"):
        raise UsageError(f"{damaged} (look at {', '.join(wrong) or 'kind'}).")
    return content

"""`experiment.yaml`: what makes a directory an experiment, read with suspicion."""

import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter
from typing_extensions import TypedDict

from bpf.errors import Damaged, UsageError
from bpf.reading import Name, PathText, fitting, text_of, yaml_of

FORMAT = 2
OLDER_FORMAT = 1
_CURE = "Put back the file that bpf wrote, or start anew in another directory."


def _check_moment(text: str) -> str:
    try:
        datetime.datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError) as error:
        raise ValueError("it is no date and time") from error
    return text


class Git(TypedDict):
    """The state of a repository."""

    root: NotRequired[str | None]
    commit: str | None
    branch: str | None
    dirty: bool
    changed_files: int


class Gpu(TypedDict):
    """A graphics processor and its memory in GiB."""

    name: str
    memory_gib: float


class Hardware(TypedDict):
    """The machine of a start."""

    host: str
    system: str
    cpu: str
    cores: int | None
    memory_gib: float | None
    gpus: list[Gpu]


class Session(TypedDict):
    """One start: its command, and on what it ran. Those of bpf 0.1 have the command and versions only."""

    command: str
    time: NotRequired[str]
    versions: NotRequired[dict[str, str | None]]
    git: NotRequired[Git | None]
    bpf_git: NotRequired[Git | None]
    hardware: NotRequired[Hardware]
    environment: NotRequired[dict[str, str]]


class Content(BaseModel):
    """What the file holds. `storage` and `files` are None where study and checkpoints lie beside it.

    `checkpoints` is a URL if those lie at one.
    """

    model_config = ConfigDict(frozen=True)

    kind: Literal["tune", "train"]
    name: Name
    created: Annotated[str, AfterValidator(_check_moment)]
    storage: PathText | None = None
    files: PathText | None = None
    checkpoints: PathText | None = None
    keep_checkpoints: bool = False
    data_dir: PathText
    spec: dict[str, Any]
    sessions: list[Session]


_CONTENT = TypeAdapter(Content)


def read(path: Path) -> Content:
    """Its content, that of bpf 0.1 in this format. Raises Damaged for anything that bpf did not write.

    One of another format is a UsageError: it is for another bpf.
    """
    try:
        content = yaml_of(text_of(path))
    except OSError as error:
        raise Damaged(path, f"it cannot be read ({error.strerror})", _CURE) from error
    except ValueError as error:
        raise Damaged(path, str(error), _CURE) from error
    if not isinstance(content, dict) or "format" not in content:
        raise Damaged(path, "it is not the file that bpf wrote", _CURE)
    if content["format"] == OLDER_FORMAT and isinstance(content.get("commands"), list):
        content["sessions"] = [{"command": command} for command in content["commands"]]
        if content["sessions"]:
            content["sessions"][-1]["versions"] = content.get("versions", {})
    elif content["format"] != FORMAT:
        raise UsageError(f"{path} is of format {content['format']!r}; this bpf reads format {FORMAT}.")
    try:
        return fitting(_CONTENT, content)
    except ValueError as error:
        raise Damaged(path, str(error), _CURE) from error

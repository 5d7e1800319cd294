"""Reading what may be damaged or hostile: texts of limited size, YAML and JSON without bombs, values of known types."""

import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, StringConstraints, TypeAdapter, ValidationError

LARGEST_TEXT = 8 * 2**20
"""Bytes of a text file that is read whole."""
MOST_REPEATED = 100_000
"""So many values a YAML file may stand for if it uses aliases; without them it is as long as it looks."""
LONGEST_NAME, LONGEST_PATH = 255, 4_000
"""What file systems hold."""

LONGEST_NUMBER = 100
_NUMBERS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}
SHORT_TEXT = 100_000
_FAST: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""For long texts; the other one tells better what is wrong."""
T = TypeVar("T")


def is_plain(text: str) -> bool:
    """Whether a text can be shown and stored as one line: no control characters, and nothing that is no character."""
    return not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", text)


def check_plain(text: str) -> str:
    """A text that can be shown as one line. Raises ValueError."""
    if not is_plain(text):
        raise ValueError("it has control characters")
    return text


def open_regular(path: Path) -> IO[bytes]:
    """A file to read. Raises OSError, and never waits: a pipe, a device or a socket is none."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(kind):
            raise OSError(errno.EINVAL, "it is no ordinary file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_name(name: str) -> str:
    """A name that can be a part of a path and of a line. Raises ValueError that says what is wrong."""
    if not name or name in (".", "..") or re.search(r"[/\\]", name) or not is_plain(name):
        raise ValueError("a name has no slashes and no control characters, and is not empty or dots alone")
    if len(name) > 200 or len(name.encode()) > LONGEST_NAME:
        raise ValueError("a name has at most 200 characters")
    return name


def check_path(path: str) -> str:
    """A path that a file system can hold. Raises ValueError that says what is wrong."""
    if not is_plain(path):
        raise ValueError("a path has no control characters")
    if len(path) > LONGEST_PATH or any(len(part.encode()) > LONGEST_NAME for part in path.split("/")):
        raise ValueError("the path is too long")
    return path


def file_name(text: str) -> str:
    """A text, such as a rule's name, as a part of a path: all but letters, digits and `_.-` becomes `_`."""
    return re.sub(r"^\.|[^\w.-]", "_", text)


Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,100}$")]
"""What bpf makes up itself and uses in file names: keys, cohorts, tokens, names of cells."""
Name = Annotated[str, AfterValidator(check_name)]
PathText = Annotated[str, AfterValidator(check_path)]


def text_of(path: Path, encoding: str = "utf-8") -> str:
    """The text in a file. Raises OSError, and ValueError for one that is too large or not text."""
    with open_regular(path) as file:
        content = file.read(LARGEST_TEXT + 1)
    if len(content) > LARGEST_TEXT:
        raise ValueError(f"it is larger than {LARGEST_TEXT // 2**20} MiB")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError("it is not text in UTF-8") from error


def yaml_of(text: str) -> Any:
    """The values in a YAML text, plain ones only. Raises ValueError that says what is wrong, and where."""
    try:
        loader = (_FAST if len(text) > SHORT_TEXT else yaml.SafeLoader)(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            distinct: dict[int, int] = {}
            if _count(node, distinct, ()) > max(MOST_REPEATED, len(distinct)):
                raise ValueError("its aliases stand for too many values")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f" (at line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"{error.problem or error.context}{at}") from error
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(_line(error)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def json_of(text: str | bytes) -> Any:
    """The value in a JSON text. Raises ValueError that says what is wrong."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(_line(error)) from error


def fitting(adapter: TypeAdapter[T], value: Any) -> T:
    """`value` as one of a type. Raises ValueError that says in one line where it is something else."""
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        at = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("function-", "constrained-")))
        said = str(first["msg"]).removeprefix("Value error, ")
        raise ValueError(f"{at or 'it'}: {said[:1].lower()}{said[1:]}") from error


def _count(node: yaml.Node, sizes: dict[int, int], above: tuple[int, ...]) -> int:
    """How many values a node stands for, its aliases written out. Raises ValueError for one that contains itself."""
    if id(node) in above:
        raise ValueError("an alias stands inside what it names")
    if id(node) not in sizes:
        if isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS and len(node.value) > LONGEST_NUMBER:
            raise ValueError("a number is too long")
        parts: list[yaml.Node] = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        sizes[id(node)] = 1 + sum(_count(part, sizes, (*above, id(node))) for part in parts)
    return sizes[id(node)]


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__

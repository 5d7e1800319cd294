"""Commands to paste: what trains a grid, with every setting that is not a default.

What a command line cannot say, an option of a rule that is no number and no plain word, makes no command: such a grid
was asked for with a spec file or from Python.
"""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bpf.experiment.directory import NOWHERE_ELSE, Experiment, Place
from bpf.spec.grid import TUNABLE, GridSpec
from bpf.study.database import Database

_ALWAYS = ("dataset", "algorithm", "objective", "lr")
"""Settings without a default, and those that others depend on."""


def fields(grid: GridSpec) -> dict[str, Any]:
    """The settings of a grid for `tune`, to be changed at will: the tunable ones and the options of rules are lists.

    There is no `lr` where learning rates come from an earlier phase.
    """
    found: dict[str, Any] = {name: value for name, value in grid if name not in ("lr_from", "options")}
    found |= {name: list(found[name]) for name in TUNABLE}
    found["options"] = {
        rule: {option: _candidates(raw) for option, raw in given.items()} for rule, given in grid.options.items()
    }
    if grid.lr_from:
        del found["lr"]
    return found


def tune(
    directory: Path,
    settings: Mapping[str, Any],
    data_dir: Path,
    place: Place = NOWHERE_ELSE,
    lr_from: Path | None = None,
) -> str | None:
    """The `bpf tune` of a grid that has all these `settings` (see `fields`); None if a command line cannot say it."""
    if not all(_speakable(values) for options in settings["options"].values() for values in options.values()):
        return None
    words = ["bpf", "tune", _path(directory), *_options(_told(settings))]
    if lr_from is not None:
        words += ["--lr-from", _path(lr_from)]
    if not data_dir.resolve() == Path("data").resolve() == Path(os.environ.get("BPF_DATA_DIR") or "data").resolve():
        words += ["--data-dir", str(data_dir.resolve())]
    return shlex.join([*words, *_where(place)])


def extend(experiment: Experiment, settings: Mapping[str, Any], lr_from: Path | None = None) -> str | None:
    """The `bpf tune` that goes on with an experiment, with settings that have grown."""
    return tune(experiment.directory, settings, experiment.data_dir, place_of(experiment), lr_from)


def place_of(experiment: Experiment) -> Place:
    """Where a command must say that an experiment is kept."""
    if experiment.is_here:
        return NOWHERE_ELSE
    usual = os.environ.get("BPF_STORAGE")
    known = Database.at(usual).public if usual else ""
    return Place(experiment.database, usual=known == experiment.database.public)


def beside(directory: Path, ending: str) -> Path:
    """The directory of the same name and `ending`."""
    named = directory if directory.name not in ("", "..") else directory.resolve()
    return named.with_name(f"{named.name}-{ending}")


def _candidates(raw: Any) -> list[Any]:
    if isinstance(raw, list | tuple):
        return list(raw)
    return list(raw.split(",")) if isinstance(raw, str) else [raw]


def _speakable(values: Sequence[Any]) -> bool:
    """None is the default of an option, as none else could be None, and goes without saying."""
    plain = (bool(value) and "," not in value if isinstance(value, str) else True for value in values)
    return list(values) == [None] or (all(isinstance(value, str | int | float) for value in values) and all(plain))


def _told(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is not a default: that of dropout depends on the objective."""
    default = GridSpec.model_validate({name: settings[name] for name in ("dataset", "algorithm", "objective")})
    skewed = list(settings["skew_type"]) != ["none"]
    told = dict(settings)
    for name, value in settings.items():
        same = (tuple(value) if isinstance(value, list) else value) == getattr(default, name)
        if (same and name not in _ALWAYS) or (name == "imbalance_factor" and not skewed):
            del told[name]
    return told


def _options(settings: Mapping[str, Any]) -> Iterator[str]:
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "options":
            for rule, options in value.items():
                for option, values in options.items():
                    if values != [None]:
                        yield from ("--option", f"{rule}.{option}={_joined(values)}")
        elif name == "batch_norm":  # both is the default
            yield from _flag(name, value[0]) if len(value) == 1 else ()
        elif isinstance(value, bool):
            yield from _flag(name, value)
        else:
            yield from (flag, _joined(value) if isinstance(value, tuple | list) else _word(value))


def _where(place: Place) -> Iterator[str]:
    if place.storage and not place.usual:
        yield from ("--storage", place.storage.public)
    if place.name:
        yield from ("--experiment", place.name)
    if place.checkpoints:
        yield from ("--checkpoints", str(place.checkpoints))
    if place.keep_checkpoints:
        yield "--keep-checkpoints"


def _flag(name: str, value: bool) -> Iterator[str]:
    yield f"--{'' if value else 'no-'}{name.replace('_', '-')}"


def _joined(values: Sequence[Any]) -> str:
    return ",".join(map(_word, values))


def _word(value: Any) -> str:
    """A value as it is read again: floats in the shorter of the two forms that are exact."""
    if isinstance(value, bool):
        return str(value).lower()
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


def _path(path: Path) -> str:
    return f"./{path}" if str(path).startswith("-") else str(path)

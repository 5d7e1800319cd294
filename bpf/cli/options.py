"""Command-line options made from a spec's fields: one definition of every name, default and range."""

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from bpf.errors import UsageError
from bpf.registry import ALGORITHMS, Registry
from bpf.spec.fields import bounds, choices
from bpf.spec.grid import DROPOUTS, TUNABLE
from bpf.spec.run import RunSpec, Settings
from bpf.spec.values import is_number

PANELS = {
    "Task": ("dataset", "algorithm", "problem_type", "objective", "keep", "options", "allow_unstable"),
    "Network": ("arch", "activation", "batch_norm", "use_bias", "bw_init", "init", "dropout", "input_dropout"),
    "Optimisation": (
        "optimizer",
        "lr",
        "schedule",
        "clip",
        "momentum",
        "weight_decay",
        "batch_size",
        "shuffle",
        "epochs",
        "early_stopping",
        "output_loss",
    ),
    "Data": (
        "examples_frac",
        "val_frac",
        "data_seed",
        "skew_type",
        "imbalance_factor",
        "scaler",
        "image_size",
    ),
    "Augmentation": ("brightness", "rotation", "zoom", "translation", "flip", "crop"),
    "Execution": ("executions_per_trial", "seed", "device", "matmul_precision", "trackers", "tracker_every"),
}
ALIASES = {
    "epochs": "--num-epochs",
    "trackers": "--tracker",
    "options": "--option",
    "executions_per_trial": "--executions",
}
FLAGS = ("batch_norm", "use_bias", "shuffle", "allow_unstable")
LISTS = ("trackers", "options")


def with_spec_options(model: type[Settings]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option per field of `model` in `PANELS`; it receives what the user gave as `given`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def wrapper(**arguments: Any) -> None:
            given = {name: arguments.pop(name) for name in fields}
            command(given={name: value for name, value in given.items() if value not in (None, [])}, **arguments)

        fields = [name for names in PANELS.values() for name in names if name in model.model_fields]
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "given"]
        made = [_parameter(model, name) for name in fields]
        wrapper.__doc__, wrapper.__name__ = command.__doc__, command.__name__
        wrapper.__signature__ = inspect.Signature([*own, *made])  # type: ignore[attr-defined]
        return wrapper

    return decorate


def merge(spec_file: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a spec file and of the command line; the command line wins, field by field."""
    merged = {**spec_file, **given}
    if "options" in given:
        merged["options"] = _merged_options(spec_file.get("options"), given["options"])
    return merged


def is_value(word: str) -> bool:
    """Whether a word is more likely the value of an option than a directory: a number, a choice or a rule's name."""
    return (
        is_number(word)
        or word.lower() in ("true", "false", "yes", "no")
        or any(word in choices(name) for name in RunSpec.model_fields)
        or word in Registry(ALGORITHMS).names()
    )


def _merged_options(in_file: Any, assignments: list[str]) -> dict[str, dict[str, Any]]:
    in_file = {} if in_file is None else in_file
    if not isinstance(in_file, dict) or not all(isinstance(values, dict) for values in in_file.values()):
        raise UsageError(f"options: {in_file!r} is not accepted: give each rule its options, as RULE: {{NAME: VALUE}}.")
    options = {rule: dict(values) for rule, values in in_file.items()}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        rule, dot, option = name.partition(".")
        if not (equals and dot and rule and option and value):
            raise UsageError(f"--option {assignment!r} is not of the form RULE.NAME=VALUE, such as my-rule.scale=0.05.")
        options.setdefault(rule, {})[option] = value
    return options


def _parameter(model: type[Settings], name: str) -> inspect.Parameter:
    panel = next(panel for panel, names in PANELS.items() if name in names)
    flag = f"--{name.replace('_', '-')}"
    names = [ALIASES[name]] if name == "options" else [flag, *([ALIASES[name]] if name in ALIASES else [])]
    kind: Any = str | None
    if name in FLAGS:
        names, kind = [f"{flag}/--no-{name.replace('_', '-')}"], bool | None
    elif name in LISTS or (name in TUNABLE and model is not RunSpec):
        kind = list[str] | None
    option = typer.Option(
        *names,
        help=_help(model, name),
        metavar=_metavar(name, kind),
        rich_help_panel=panel,
        show_default=False,
    )
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])


def _metavar(name: str, kind: Any) -> str | None:
    if name in FLAGS:
        return None
    word = {"options": "RULE.NAME=VALUE", "arch": "UNITS-UNITS", "dataset": "NAME"}.get(name)
    field = RunSpec.model_fields.get(name)
    numeric = field is not None and ("float" in str(field.annotation) or "int" in str(field.annotation))
    word = word or ("NUMBER" if numeric or field is None else "WORD")
    return f"{word},..." if kind == list[str] | None and name != "options" else word


def _help(model: type[Settings], name: str) -> str:
    """Description, choices or range, and default, such as `Learning rate. [above 0 to 10] [default: 0.001]`."""
    field = model.model_fields[name]
    described = RunSpec.model_fields.get(name) or field
    parts = [described.description or ""]
    words = choices(name) if name in RunSpec.model_fields else ()
    limits = ", ".join(words) or bounds(model, name)
    if limits:
        parts.append(f"[{limits}{', or all' if name == 'skew_type' and model is not RunSpec else ''}]")
    if name == "dropout" and model is not RunSpec:
        parts.append(f"[default: 0; {_show(DROPOUTS)} with a val_* objective]")
    elif field.is_required():
        parts.append("[required]")
    elif field.default not in (None, ()) and name != "options":
        parts.append(f"[default: {_show(field.default)}]")
    return " ".join(parts).replace("[", "\\[")


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_show, value))
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)

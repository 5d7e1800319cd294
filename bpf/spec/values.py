"""The values that settings take: words, numbers in their ranges, lists of them, and how they may be written."""

import itertools
import math
import re
import typing
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from bpf.spec import schedules

ActivationName = Literal["tanh", "relu", "swish", "lrelu", "sigmoid", "gelu", "elu"]
FeedbackInit = Literal["ortho", "lecun", "frenkel", "nokland", "principled"]
ForwardInit = Literal["orthogonal", "torch", "zeros", "aligned", "he_uniform", "xavier", "akrout"]
OptimizerName = Literal["adam", "adamw", "sgd", "nag", "rmsprop"]
SkewType = Literal["none", "long_tailed", "step"]
ObjectiveName = Literal["loss", "error", "val_loss", "val_error"]
KeepName = Literal["best", "last"]
LossName = Literal["ce", "bce", "mse"]
MatmulPrecision = Literal["highest", "high"]
ScalerName = Literal["standard", "zero_one", "identity"]
"""Or MEANS/DEVIATIONS, see `check_scaler`."""

BOUNDED_ACTIVATIONS = frozenset({"tanh", "sigmoid"})
DEFAULT_IMBALANCE_FACTOR = 10.0
MAX_SEED = 2**31
MAX_EPOCHS = 1_000_000
MAX_UNITS, MAX_LAYERS = 65_536, 100


class Frozen(BaseModel):
    """Immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def check_arch(value: Any) -> str:
    text = str(value).strip()
    if not re.fullmatch(r"[0-9]+(-[0-9]+)*", text):
        raise ValueError("give the hidden layers' units joined by hyphens, such as 500-500-1000-500")
    widths = [int(part) for part in text.split("-")]
    if min(widths) < 1 or max(widths) > MAX_UNITS or len(widths) > MAX_LAYERS:
        raise ValueError(f"a layer has 1 to {MAX_UNITS} units, and there are at most {MAX_LAYERS} layers")
    return "-".join(map(str, widths))


def check_interval(value: Any) -> str:
    found = re.fullmatch(r"0*([1-9][0-9]{0,8}) *(epochs?|steps?)?", str(value).strip())
    if not found:
        raise ValueError("give a number of epochs, such as 5, or of steps, such as 100 steps")
    return f"{found[1]} steps" if (found[2] or "").startswith("step") else found[1]


def check_device(value: str) -> str:
    one = "cpu|cuda(:(0|[1-9][0-9]?))?"
    if not re.fullmatch(rf"auto|mps|({one})(,({one}))*", value):
        raise ValueError("give auto, cpu, cuda, cuda:N, several as cuda:0,cuda:1, or mps")
    return value


LOCAL, AUTO = "ray", "auto"
"""What `--on` can be besides an address: a cluster of the command's own, and the one that runs."""


def check_cluster(value: str) -> str:
    if value not in (LOCAL, AUTO) and not re.fullmatch(r"(ray://)?([\w.-]+|\[[0-9a-fA-F:]+\]):[0-9]{1,5}", value):
        raise ValueError(
            "give ray for a cluster of the command's own on this machine, auto for the one that runs here, HOST:PORT "
            "of its head, or ray://HOST:PORT"
        )
    return value


def channel_numbers(scaler: str) -> tuple[list[float], list[float]]:
    """The means and deviations that a scaler of numbers states, one for each channel or one for all."""
    means, _, deviations = scaler.partition("/")
    return [float(number) for number in means.split(",")], [float(number) for number in deviations.split(",")]


def check_scaler(value: str) -> str:
    """A name, or means and standard deviations of pixel values in 0..255: `33.3/78.6`, `125,123,114/63,62,67`."""
    if value in typing.get_args(ScalerName):
        return value
    parts = [part.split(",") for part in value.split("/")]
    numbers = len(parts) == 2 and all(map(is_number, itertools.chain(*parts)))
    if not numbers or len(parts[0]) != len(parts[1]):
        raise ValueError(
            f"give {', '.join(typing.get_args(ScalerName))}, or MEANS/DEVIATIONS of the pixels in 0..255, "
            "such as 33.3/78.6 or 125,123,114/63,62,67"
        )
    means, deviations = channel_numbers(value)
    if not (all(0 <= mean <= 255 for mean in means) and all(0 < deviation <= 255 for deviation in deviations)):
        raise ValueError("pixels are in 0..255, and so are their means and deviations, which are not 0")
    return value


def one_or_many(value: Any) -> Any:
    """`"1e-3,1e-2"`, `["1e-3", "1e-2"]`, `0.1` and `[0.1]` all become a flat list."""
    flat: list[Any] = []
    for item in value if isinstance(value, list | tuple) else [value]:
        flat += [part.strip() for part in item.split(",")] if isinstance(item, str) else [item]
    if not flat or "" in flat:
        raise ValueError("the list is empty or has an empty entry")
    return flat


def none_or_many(value: Any) -> Any:
    """As `one_or_many`; nothing, and an empty list, are none."""
    return () if value is None or value in ([], ()) else one_or_many(value)


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    twice = [value for value in dict.fromkeys(values) if values.count(value) > 1]
    if twice:
        raise ValueError(f"{twice[0]} is there more than once")
    return values


def is_number(text: str) -> bool:
    """Whether a text is a number as bpf reads them: in ASCII, with nothing between its digits."""
    return re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text) is not None


def check_options(options: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """As `check_digits` for a rule's options, whose types are not known here: of what Python takes for a number."""
    for value in (value for values in options.values() for value in values.values()):
        for item in value if isinstance(value, list | tuple) else [value]:
            for text in item.split(",") if isinstance(item, str) else []:
                try:
                    odd = math.isfinite(float(text)) and not is_number(text.strip())
                except ValueError:
                    continue
                if odd:
                    raise ValueError(f"{text!r} is no number: write it with the digits 0 to 9, such as 1000 or 0.001")
    return options


def check_digits(value: Any) -> None:
    """Raise ValueError for a number in a text that Python reads and hardly anybody writes: 1_000, or other digits."""
    for text in value if isinstance(value, list | tuple) else [value]:
        if isinstance(text, str) and ("_" in text or not text.isascii()):
            raise ValueError("write numbers with the digits 0 to 9, such as 1000 or 0.001")


def all_skews(value: Any) -> Any:
    values = one_or_many(value)
    return list(typing.get_args(SkewType)) if values == ["all"] else values


def many(item: Any) -> Any:
    return Annotated[tuple[item, ...], BeforeValidator(one_or_many), AfterValidator(distinct), Field(min_length=1)]


Arch = Annotated[str, BeforeValidator(check_arch)]
Schedule = Annotated[str, AfterValidator(schedules.check)]
LearningRate = Annotated[float, Field(gt=0, le=10)]
WeightDecay = Annotated[float, Field(ge=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
ImbalanceFactor = Annotated[float, Field(ge=1, le=10_000)]
BatchSize = Annotated[int, Field(ge=1, le=1_000_000)]


def check_dropout(objective: str, keep: str, rates: typing.Sequence[float]) -> None:
    fixed = keep == "last" and len(rates) == 1  # so that the objective chooses nothing
    if any(rates) and not fixed and not objective.startswith("val_"):
        raise ValueError(
            f"dropout with objective {objective}: dropout regularises, and a training objective cannot see that, so "
            "it would have no effect but to make the objective worse. Use objective val_loss or val_error, leave "
            "dropout out, or fix one rate and keep the last epoch's network (keep last)."
        )


def check_factor(skews: typing.Sequence[str], given: bool) -> None:
    if given and all(skew == "none" for skew in skews):
        raise ValueError(
            "imbalance_factor without skew: skew_type is none, so the factor would have no effect. "
            "Give skew_type long_tailed, step or all, or leave imbalance_factor out."
        )

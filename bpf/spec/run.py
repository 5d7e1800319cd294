"""Run specs and grid specs: every setting, its default, its range, and the rules that hold between them.

A `RunSpec` determines one training run. A `GridSpec` has the same fields, and the tunable ones may be lists.
Both are frozen pydantic models; the command line, the spec files and the JSON schema are made from them.
"""

import hashlib
import itertools
import json
import re
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

ActivationName = Literal["tanh", "relu", "swish", "lrelu", "sigmoid", "gelu"]
FeedbackInit = Literal["ortho", "lecun", "frenkel", "nokland", "principled"]
ForwardInit = Literal["orthogonal", "torch", "zeros", "aligned"]
OptimizerName = Literal["adam", "adamw", "sgd", "nag", "rmsprop"]
SkewType = Literal["none", "long_tailed", "step"]
ObjectiveName = Literal["loss", "error", "val_loss", "val_error"]
LossName = Literal["ce", "bce", "mse"]
ScalerName = Literal["standard", "zero_one", "identity"]

BOUNDED_ACTIVATIONS = frozenset({"tanh", "sigmoid"})
DEFAULT_IMBALANCE_FACTOR = 10.0
MAX_SEED = 2**31
MAX_UNITS, MAX_LAYERS = 65_536, 100


def _check_arch(value: Any) -> str:
    text = str(value).strip()
    if not re.fullmatch(r"\d+(-\d+)*", text):
        raise ValueError("give the hidden layers' units joined by hyphens, such as 500-500-1000-500")
    widths = [int(part) for part in text.split("-")]
    if min(widths) < 1 or max(widths) > MAX_UNITS or len(widths) > MAX_LAYERS:
        raise ValueError(f"a layer has 1 to {MAX_UNITS} units, and there are at most {MAX_LAYERS} layers")
    return "-".join(map(str, widths))


def _check_interval(value: Any) -> str:
    found = re.fullmatch(r"0*([1-9]\d{0,8}) *(epochs?|steps?)?", str(value).strip())
    if not found:
        raise ValueError("give a number of epochs, such as 5, or of steps, such as 100 steps")
    return f"{found[1]} steps" if (found[2] or "").startswith("step") else found[1]


def _check_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?(,cuda:\d+)*", value):
        raise ValueError("give auto, cpu, cuda, cuda:N, several as cuda:0,cuda:1, or mps")
    return value


def _one_or_many(value: Any) -> Any:
    """`"1e-3,1e-2"`, `["1e-3", "1e-2"]`, `0.1` and `[0.1]` all become a flat list."""
    flat: list[Any] = []
    for item in value if isinstance(value, list | tuple) else [value]:
        flat += [part.strip() for part in item.split(",")] if isinstance(item, str) else [item]
    if not flat or "" in flat:
        raise ValueError("the list is empty or has an empty entry")
    return flat


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


def _all_skews(value: Any) -> Any:
    values = _one_or_many(value)
    return list(typing.get_args(SkewType)) if values == ["all"] else values


Arch = Annotated[str, BeforeValidator(_check_arch)]
LearningRate = Annotated[float, Field(gt=0, le=10)]
WeightDecay = Annotated[float, Field(ge=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
ImbalanceFactor = Annotated[float, Field(ge=1, le=10_000)]
BatchSize = Annotated[int, Field(ge=1, le=1_000_000)]


def _is_number(model: type[BaseModel], name: str) -> bool:
    return name in model.model_fields and bool(re.search(r"\b(int|float)\b", str(model.model_fields[name].annotation)))


class Frozen(BaseModel):
    """Immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Settings(Frozen):
    """What a run and a grid state in the same way."""

    dataset: str = Field(
        description="Data set: digits, mnist, fmnist, cifar10, cifar100, caltech256, eurosat, folder:PATH, "
        "npz:PATH, or a plugin's (see `bpf datasets`)."
    )
    problem_type: Literal["classification", "reconstruction"] = Field(
        "classification", description="Predict the label, or reconstruct the image (an autoencoder)."
    )
    objective: ObjectiveName = Field(
        "loss",
        description="What is minimised; val_* are measured on the held-out split of the training set. "
        "The test set never selects.",
    )
    epochs: int = Field(300, ge=1, le=1_000_000, description="Passes over the training part.")
    examples_frac: float = Field(
        0.5, ge=0, le=1, description="Stratified fraction of the training set that is used; 0 and 1 mean all."
    )
    val_frac: float = Field(
        0.1, ge=0, lt=1, description="Stratified fraction of the used training set that is held out."
    )
    output_loss: Literal["auto", LossName] = Field(
        "auto", description="Loss of the output layer; auto is ce for classification, mse for reconstruction."
    )
    scaler: ScalerName = Field("standard", description="Pixel values: [-1, 1], [0, 1], or 0..255 as they are.")
    use_bias: bool = Field(True, description="Whether layers have biases.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of sgd and nag; the others ignore it.")
    early_stopping: int = Field(
        0, ge=0, description="Stop a run after this many epochs without a better objective; 0 is off."
    )
    brightness: float = Field(
        0.0, ge=0, le=1, description="Augmentation: brightness varies by this fraction; 0 is off."
    )
    rotation: float = Field(
        0.0, ge=0, le=180, description="Augmentation: rotation by up to this many degrees; 0 is off."
    )
    zoom: float = Field(0.0, ge=0, lt=1, description="Augmentation: zoom by up to this fraction; 0 is off.")
    translation: float = Field(
        0.0, ge=0, le=1, description="Augmentation: shift by up to this fraction of the side; 0 is off."
    )
    image_size: int | None = Field(
        None, ge=1, le=4096, description="Side in pixels to which the images of folder:PATH are resized."
    )
    seed: int = Field(0, ge=0, lt=MAX_SEED, description="Seed of weights, feedback, order, dropout and augmentation.")
    data_seed: int = Field(0, ge=0, lt=MAX_SEED, description="Seed of the subset, the validation split and the skew.")
    device: Annotated[str, AfterValidator(_check_device)] = Field(
        "auto",
        description="auto, cpu, cuda, cuda:N, cuda:0,cuda:1,... or mps; auto takes the GPUs where there are any.",
    )
    trackers: Annotated[tuple[str, ...], BeforeValidator(lambda v: _one_or_many(v) if v else ())] = Field(
        (),
        description="Measurements on a probe batch: bp_cosine, weight_alignment, gradients, weights, local_loss, "
        "activations, or a plugin's.",
    )
    tracker_every: Annotated[str, BeforeValidator(_check_interval)] = Field(
        "1", description="How often to measure: every N epochs, or every N steps as in `100 steps`."
    )
    allow_unstable: bool = Field(False, description="Allow combinations known to diverge, such as drtp with relu.")
    options: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="A rule's own options as RULE.NAME=VALUE (see `bpf algorithms RULE`).",
    )

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_numbers(cls, values: Any) -> Any:
        """YAML reads `yes` as true, which pydantic would take for 1."""
        for name, value in values.items() if isinstance(values, dict) else ():
            several = value if isinstance(value, list | tuple) else [value]
            if any(isinstance(one, bool) for one in several) and _is_number(cls, name):
                raise ValueError(f"{name}: {value!r} is not accepted: it must be a number.")
        return values

    @property
    def tracking(self) -> tuple[str, int]:
        """The unit, `epochs` or `steps`, and the interval of the trackers."""
        number, _, unit = self.tracker_every.partition(" ")
        return unit or "epochs", int(number)

    @property
    def resolved_loss(self) -> LossName:
        if self.output_loss != "auto":
            return self.output_loss
        return "ce" if self.problem_type == "classification" else "mse"

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if self.problem_type == "reconstruction":
            if self.objective.endswith("error"):
                cure = self.objective.replace("error", "loss")
                raise ValueError(
                    f"objective {self.objective} with problem_type reconstruction: only classification has an "
                    f"error rate. Use objective {cure}."
                )
            if self.output_loss == "ce":
                raise ValueError(
                    "output_loss ce with problem_type reconstruction: pixels are not classes. "
                    "Use output_loss mse (or bce with scaler zero_one)."
                )
            if self.output_loss == "bce" and self.scaler != "zero_one":
                raise ValueError(
                    f"output_loss bce with scaler {self.scaler}: bce needs targets in [0, 1]. "
                    "Use scaler zero_one, or output_loss mse."
                )
        if self.objective.startswith("val_") and self.val_frac == 0:
            raise ValueError(
                f"objective {self.objective} with val_frac 0: there is no validation split to measure. "
                "Give val_frac, such as 0.1."
            )
        return self


class RunSpec(Settings):
    """Everything that determines one training run."""

    algorithm: str = Field(
        description="Learning rule: bp, dfa, drtp, ll-cce, ll-mse, or a plugin's (see `bpf algorithms`)."
    )
    arch: Arch = Field("500", description="Units of the hidden layers, such as 500-500-1000-500.")
    activation: ActivationName = Field("tanh", description="Activation of the hidden layers.")
    batch_norm: bool = Field(False, description="Batch normalisation between linear map and activation.")
    bw_init: FeedbackInit = Field("ortho", description="Initialisation of the feedback matrices.")
    init: ForwardInit = Field("orthogonal", description="Initialisation of the forward weights.")
    optimizer: OptimizerName = Field("adam", description="Optimizer (sgd and nag take --momentum).")
    lr: LearningRate = Field(0.001, description="Learning rate.")
    weight_decay: WeightDecay = Field(0.0, description="Weight decay (decoupled with adamw).")
    batch_size: BatchSize = Field(64, description="Examples in a batch.")
    dropout: Dropout = Field(0.0, description="Dropout rate after each hidden layer; val_* objectives only.")
    skew_type: SkewType = Field("none", description="Class imbalance made in the training part.")
    imbalance_factor: ImbalanceFactor | None = Field(
        None, description="Most frequent over least frequent class; 10 where a skew is asked for."
    )

    @model_validator(mode="before")
    @classmethod
    def _default_factor(cls, values: Any) -> Any:
        skewed = isinstance(values, dict) and values.get("skew_type", "none") in ("long_tailed", "step")
        if skewed and values.get("imbalance_factor") is None:
            return {**values, "imbalance_factor": DEFAULT_IMBALANCE_FACTOR}
        return values

    @model_validator(mode="after")
    def _run_agrees(self) -> Self:
        _check_dropout(self.objective, [self.dropout])
        _check_factor([self.skew_type], self.imbalance_factor is not None)
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Units of the hidden layers."""
        return tuple(int(units) for units in self.arch.split("-"))

    def rule_options(self) -> dict[str, Any]:
        """The options given for this run's rule."""
        return self.options.get(self.algorithm, {})

    def identity(self, unused: frozenset[str] = frozenset()) -> dict[str, Any]:
        """What determines the numbers, with defaults resolved: equal identities give equal results.

        Where a run happens and what is measured on the way are left out, and so are the parameters that mean
        nothing to the rule (`unused`).
        """
        fields = self.model_dump(exclude={"device", "trackers", "tracker_every", "allow_unstable", *unused})
        fields |= {"output_loss": self.resolved_loss, "examples_frac": self.examples_frac or 1.0}
        fields["options"] = {self.algorithm: self.rule_options()} if self.rule_options() else {}
        if self.optimizer not in ("sgd", "nag"):
            del fields["momentum"]
        return fields


def work(spec: Mapping[str, Any]) -> float:
    """The work of one run, up to a factor: epochs × weights. Good for shares, not for seconds."""
    widths = [int(units) for units in spec["arch"].split("-")]
    weights = sum(a * b for a, b in itertools.pairwise(widths)) + 1000 * (widths[0] + widths[-1])
    return float(spec["epochs"] * (weights + 20_000))


def digest(value: Any) -> str:
    """16 hexadecimal digits of SHA-256 over canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Rate(Frozen):
    """The learning rate that an earlier phase found best for one setup of a rule.

    `params` are the setup: the rule's parameters as its cells have them, without `lr` and without what a `val_*`
    objective tunes (`REGULARISATION`).
    """

    algorithm: str
    params: Mapping[str, bool | int | float | str | None]
    lr: LearningRate


REGULARISATION = ("dropout", "weight_decay")
"""What the objectives on held-out examples tune, with the learning rate of an earlier phase."""


def _rates(value: Any) -> Any:
    if isinstance(value, str):
        raise ValueError("it holds learning rates; the experiment to take them from is given with --lr-from")
    return value


def _many(item: Any) -> Any:
    return Annotated[tuple[item, ...], BeforeValidator(_one_or_many), AfterValidator(_distinct), Field(min_length=1)]


class GridSpec(Settings):
    """A run spec whose tunable fields may be lists: the grid is their Cartesian product, per rule."""

    algorithm: _many(str)  # type: ignore[valid-type]
    arch: _many(Arch) = (  # type: ignore[valid-type]
        "500",
        "500-500-500-500-500",
        "500-1000-500",
        "1000",
        "1000-1000",
        "1000-500-1000",
    )
    activation: _many(ActivationName) = ("tanh", "relu", "swish", "lrelu")  # type: ignore[valid-type]
    batch_norm: _many(bool) = (False, True)  # type: ignore[valid-type]
    bw_init: _many(FeedbackInit) = ("ortho", "lecun")  # type: ignore[valid-type]
    init: _many(ForwardInit) = ("orthogonal",)  # type: ignore[valid-type]
    optimizer: _many(OptimizerName) = ("adam",)  # type: ignore[valid-type]
    lr: _many(LearningRate) = (0.0001, 0.001, 0.01, 0.1)  # type: ignore[valid-type]
    weight_decay: _many(WeightDecay) = (0.0,)  # type: ignore[valid-type]
    batch_size: _many(BatchSize) = (64,)  # type: ignore[valid-type]
    dropout: _many(Dropout) = (0.0,)  # type: ignore[valid-type]
    skew_type: Annotated[
        tuple[SkewType, ...], BeforeValidator(_all_skews), AfterValidator(_distinct), Field(min_length=1)
    ] = ("none",)
    imbalance_factor: _many(ImbalanceFactor) = (DEFAULT_IMBALANCE_FACTOR,)  # type: ignore[valid-type]
    executions_per_trial: int = Field(
        3, ge=1, le=1000, description="Differently seeded runs of each cell (seed, seed + 1, ...)."
    )
    lr_from: Annotated[tuple[Rate, ...], BeforeValidator(_rates)] = Field(
        (),
        description="Instead of lr, for val_* objectives: the learning rate of each setup, as `bpf tune --lr-from` "
        "takes them from an earlier phase and writes them down.",
    )

    @model_validator(mode="before")
    @classmethod
    def _default_dropout(cls, values: Any) -> Any:
        if isinstance(values, dict) and str(values.get("objective", "")).startswith("val_"):
            return {"dropout": (0.1, 0.2, 0.3, 0.4, 0.5), **values}
        return values

    @model_validator(mode="after")
    def _grid_agrees(self) -> Self:
        _check_dropout(self.objective, self.dropout)
        _check_factor(self.skew_type, "imbalance_factor" in self.model_fields_set)
        if self.seed + self.executions_per_trial > MAX_SEED:
            raise ValueError(
                f"seed {self.seed} with executions_per_trial {self.executions_per_trial}: executions have the seeds "
                f"from seed on, which must stay below {MAX_SEED}. Use a smaller seed."
            )
        self._check_rates()
        return self

    def _check_rates(self) -> None:
        if not self.lr_from:
            return
        if not self.objective.startswith("val_"):
            raise ValueError(
                f"lr_from with objective {self.objective}: this objective tunes the learning rate itself. "
                "Use objective val_loss or val_error, or leave lr_from out."
            )
        if "lr" in self.model_fields_set:
            raise ValueError("lr with lr_from: each setup has the learning rate of the earlier phase. Leave one out.")
        setups = {(rate.algorithm, frozenset(rate.params.items())) for rate in self.lr_from}
        if len(setups) < len(self.lr_from):
            raise ValueError("lr_from: a setup has more than one learning rate.")

    @property
    def awaits_rates(self) -> bool:
        """Whether learning rates must be taken from an earlier phase before there can be a plan."""
        return self.objective.startswith("val_") and not self.lr_from and "lr" not in self.model_fields_set

    @model_serializer(mode="wrap")
    def _one_source_of_rates(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Either `lr` or `lr_from`, so that what is written down says what holds."""
        fields: dict[str, Any] = dump(self)
        fields.pop("lr" if self.lr_from else "lr_from", None)
        return fields


TUNABLE = tuple(
    name for name in GridSpec.model_fields if name in set(RunSpec.model_fields) - set(Settings.model_fields)
)


def _check_dropout(objective: str, rates: typing.Sequence[float]) -> None:
    if any(rates) and not objective.startswith("val_"):
        raise ValueError(
            f"dropout with objective {objective}: dropout regularises, and a training objective cannot see that, so "
            "it would have no effect but to make the objective worse. Use objective val_loss or val_error, or leave "
            "dropout out."
        )


def _check_factor(skews: typing.Sequence[str], given: bool) -> None:
    if given and all(skew == "none" for skew in skews):
        raise ValueError(
            "imbalance_factor without skew: skew_type is none, so the factor would have no effect. "
            "Give skew_type long_tailed, step or all, or leave imbalance_factor out."
        )

"""What a single run is asked to be: every setting, its default, its range, and the rules that hold between them.

A `RunSpec` determines one training run; `Settings` are the fields that a grid states in the same way. They are frozen
pydantic models: the command line, the spec files and the JSON schema are made from them.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator

from bpf.reading import check_plain
from bpf.spec.values import (
    DEFAULT_IMBALANCE_FACTOR,
    MAX_EPOCHS,
    MAX_SEED,
    ActivationName,
    Arch,
    BatchSize,
    Dropout,
    FeedbackInit,
    ForwardInit,
    Frozen,
    ImbalanceFactor,
    KeepName,
    LearningRate,
    LossName,
    MatmulPrecision,
    ObjectiveName,
    OptimizerName,
    Schedule,
    SkewType,
    WeightDecay,
    check_device,
    check_digits,
    check_dropout,
    check_factor,
    check_interval,
    check_options,
    check_scaler,
    distinct,
    none_or_many,
)


def _is_number(model: type[BaseModel], name: str) -> bool:
    return name in model.model_fields and bool(re.search(r"\b(int|float)\b", str(model.model_fields[name].annotation)))


NEWER = ("matmul_precision", "schedule", "clip", "shuffle", "input_dropout", "flip", "crop", "keep")
"""Fields that no identity and no cell names at their defaults, as it was before there was a choice."""


class Settings(Frozen):
    """What a run and a grid state in the same way."""

    dataset: Annotated[str, AfterValidator(check_plain)] = Field(
        description="Data set: digits, mnist, fmnist, kmnist, cifar10, cifar100, caltech256, eurosat, folder:PATH, "
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
    keep: KeepName = Field(
        "best",
        description="Which network an execution keeps and tests: that of its best epoch by the objective, or its last "
        "one.",
    )
    epochs: int = Field(300, ge=1, le=MAX_EPOCHS, description="Passes over the training part.")
    examples_frac: float = Field(
        0.5, ge=0, le=1, description="Stratified fraction of the training set that is used; 0 and 1 mean all."
    )
    val_frac: float = Field(
        0.1, ge=0, lt=1, description="Stratified fraction of the used training set that is held out."
    )
    output_loss: Literal["auto", LossName] = Field(
        "auto", description="Loss of the output layer; auto is ce for classification, mse for reconstruction."
    )
    scaler: Annotated[str, AfterValidator(check_scaler)] = Field(
        "standard",
        description="Pixel values: standard [-1, 1], zero_one [0, 1], identity 0..255 as they are, or "
        "MEANS/DEVIATIONS of these for one or each channel, such as 125,123,114/63,62,67.",
    )
    use_bias: bool = Field(True, description="Whether layers have biases.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of sgd and nag; the others ignore it.")
    shuffle: bool = Field(
        True, description="Whether training examples come in a new order every epoch, or in that of the data set."
    )
    input_dropout: Dropout = Field(0.0, description="Dropout rate of the inputs; 0 is off.")
    clip: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="Scale an execution's gradient down to this norm over all parameters; 0 is off.",
    )
    early_stopping: int = Field(
        0,
        ge=0,
        le=MAX_EPOCHS,
        description="Stop an execution after this many epochs without a better objective; 0 is off.",
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
    flip: float = Field(
        0.0, ge=0, le=1, description="Augmentation: probability of being mirrored left to right; 0 is off."
    )
    crop: int = Field(
        0,
        ge=0,
        le=64,
        description="Augmentation: pad by this many black pixels and crop back to the size at a random place; 0 is "
        "off.",
    )
    image_size: int | None = Field(
        None, ge=1, le=4096, description="Side in pixels to which the images of folder:PATH are resized."
    )
    seed: int = Field(0, ge=0, lt=MAX_SEED, description="Seed of weights, feedback, order, dropout and augmentation.")
    data_seed: int = Field(0, ge=0, lt=MAX_SEED, description="Seed of the subset, the validation split and the skew.")
    device: Annotated[str, AfterValidator(check_device)] = Field(
        "auto",
        description="auto, cpu, cuda, cuda:N, cuda:0,cuda:1,... or mps; auto takes the GPUs where there are any.",
    )
    matmul_precision: MatmulPrecision = Field(
        "highest",
        description="Matrix products of float32, in torch's words: highest is exact to float32, high may round "
        "factors to fewer bits (TF32 on a GPU), which is faster.",
    )
    trackers: Annotated[tuple[str, ...], BeforeValidator(none_or_many), AfterValidator(distinct)] = Field(
        (),
        description="Measurements on a probe batch: bp_cosine, weight_alignment, gradients, weights, local_loss, "
        "activations, or a plugin's.",
    )
    tracker_every: Annotated[str, BeforeValidator(check_interval)] = Field(
        "1", description="How often to measure: every N epochs, or every N steps as in `100 steps`."
    )
    allow_unstable: bool = Field(False, description="Allow combinations known to diverge, such as drtp with relu.")
    options: Annotated[dict[str, dict[str, Any]], AfterValidator(check_options)] = Field(
        default_factory=dict,
        description="A rule's own options as RULE.NAME=VALUE (see `bpf algorithms RULE`).",
    )

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_numbers(cls, values: Any) -> Any:
        """YAML reads `yes` as true, which pydantic would take for 1, as it takes `1_000` for 1000."""
        for name, value in values.items() if isinstance(values, dict) else ():
            several = value if isinstance(value, list | tuple) else [value]
            if not _is_number(cls, name):
                continue
            if any(isinstance(one, bool) for one in several):
                raise ValueError(f"{name}: {value!r} is not accepted: it must be a number.")
            try:
                check_digits(value)
            except ValueError as error:
                raise ValueError(f"{name}: {value!r} is not accepted: {error}.") from None
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
        if self.keep == "last" and self.early_stopping:
            raise ValueError(
                f"keep last with early_stopping {self.early_stopping}: an execution that stops early does so for the "
                "sake of its best epoch. Leave one of them out."
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
    schedule: Schedule = Field(
        "constant",
        description="Learning rate over the epochs: constant, cosine or linear (to zero), linear@EPOCH (after it), "
        "or FACTOR@EPOCH-EPOCH such as 0.1@60-90 (times FACTOR after each).",
    )
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
        check_dropout(self.objective, self.keep, [self.dropout])
        check_factor([self.skew_type], self.imbalance_factor is not None)
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Units of the hidden layers."""
        return tuple(int(units) for units in self.arch.split("-"))

    @property
    def unchanged(self) -> frozenset[str]:
        """The newer fields at their defaults, which names and keys on disk do not know."""
        return frozenset(name for name in NEWER if getattr(self, name) == type(self).model_fields[name].default)

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
        return {name: value for name, value in fields.items() if name not in self.unchanged}


def work(spec: Mapping[str, Any]) -> float:
    """The work of one run, up to a factor: epochs × weights. Good for shares, not for seconds."""
    widths = [int(units) for units in spec["arch"].split("-")]
    weights = sum(a * b for a, b in itertools.pairwise(widths)) + 1000 * (widths[0] + widths[-1])
    return float(spec["epochs"] * (weights + 20_000))


def digest(value: Any) -> str:
    """16 hexadecimal digits of SHA-256 over canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]

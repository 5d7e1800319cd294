"""What a grid is asked to be: a run spec whose tunable fields are lists."""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from bpf.spec.rows import COMMON, Row, Rows
from bpf.spec.run import RunSpec, Settings
from bpf.spec.values import (
    DEFAULT_IMBALANCE_FACTOR,
    MAX_SEED,
    ActivationName,
    Arch,
    BatchSize,
    Dropout,
    FeedbackInit,
    ForwardInit,
    Frozen,
    ImbalanceFactor,
    LearningRate,
    OptimizerName,
    Schedule,
    SkewType,
    WeightDecay,
    all_skews,
    check_dropout,
    check_factor,
    distinct,
    many,
    one_or_many,
)


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
DROPOUTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
"""What these objectives try if nothing is said; none is the control."""


_OWN_DEFAULTS = ("algorithm", "skew_type", "imbalance_factor")
"""Tunable fields whose default here is no list of several values."""


def _rules_of(rows: Any) -> list[Any]:
    """The rules that rows name, as far as they can be read before they are validated."""
    found = [row.get("settings") if isinstance(row, Mapping) else None for row in rows.values()]
    named = [settings.get("algorithm") for settings in found if isinstance(settings, Mapping)]
    return list(dict.fromkeys(rule for rule in named if isinstance(rule, str)))


def _rates(value: Any) -> Any:
    if isinstance(value, str):
        raise ValueError("it holds learning rates; the experiment to take them from is given with --lr-from")
    return value


class GridSpec(Settings):
    """A run spec whose tunable fields may be lists: the grid is their Cartesian product, per rule."""

    algorithm: many(str)  # type: ignore[valid-type]
    arch: many(Arch) = (  # type: ignore[valid-type]
        "500",
        "500-500-500-500-500",
        "500-1000-500",
        "1000",
        "1000-1000",
        "1000-500-1000",
    )
    activation: many(ActivationName) = ("tanh", "relu", "swish", "lrelu")  # type: ignore[valid-type]
    batch_norm: many(bool) = (False, True)  # type: ignore[valid-type]
    bw_init: many(FeedbackInit) = ("ortho", "lecun")  # type: ignore[valid-type]
    init: many(ForwardInit) = ("orthogonal",)  # type: ignore[valid-type]
    optimizer: many(OptimizerName) = ("adam",)  # type: ignore[valid-type]
    lr: many(LearningRate) = (0.0001, 0.001, 0.01, 0.1)  # type: ignore[valid-type]
    schedule: many(Schedule) = ("constant",)  # type: ignore[valid-type]
    weight_decay: many(WeightDecay) = (0.0,)  # type: ignore[valid-type]
    batch_size: many(BatchSize) = (64,)  # type: ignore[valid-type]
    dropout: many(Dropout) = (0.0,)  # type: ignore[valid-type]
    skew_type: Annotated[
        tuple[SkewType, ...], BeforeValidator(all_skews), AfterValidator(distinct), Field(min_length=1)
    ] = ("none",)
    imbalance_factor: many(ImbalanceFactor) = (DEFAULT_IMBALANCE_FACTOR,)  # type: ignore[valid-type]
    executions_per_trial: int = Field(
        3, ge=1, le=1000, description="Executions of each cell: how often it is trained, with seed, seed + 1, ..."
    )
    lr_from: Annotated[tuple[Rate, ...], BeforeValidator(_rates)] = Field(
        (),
        description="Instead of lr, for val_* objectives: the learning rate of each setup, as `bpf tune --lr-from` "
        "takes them from an earlier phase and writes them down.",
    )
    rows: Rows = Field(
        default_factory=dict,
        description="Named settings in place of one grid: each row is the grid of its settings on top of the others, "
        "of one rule. What is stated nowhere is not tuned, and has the default of `bpf train`.",
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("rows") and isinstance(values["rows"], Mapping):
            single = {name: RunSpec.model_fields[name].default for name in TUNABLE if name not in _OWN_DEFAULTS}
            rules = _rules_of(values["rows"])
            given = values.get("algorithm")
            if given and rules and set(one_or_many(given)) != set(rules):
                raise ValueError("algorithm beside rows: each row states its own. Leave algorithm out.")
            return {**single, **values, **({"algorithm": rules} if rules else {})}
        if isinstance(values, dict) and str(values.get("objective", "")).startswith("val_"):
            return {"dropout": DROPOUTS, **values}
        return values

    @model_validator(mode="after")
    def _grid_agrees(self) -> Self:
        check_dropout(self.objective, self.keep, self.dropout)
        check_factor(self.skew_type, "imbalance_factor" in self.model_fields_set)
        if self.seed + self.executions_per_trial > MAX_SEED:
            raise ValueError(
                f"seed {self.seed} with executions_per_trial {self.executions_per_trial}: executions have the seeds "
                f"from seed on, which must stay below {MAX_SEED}. Use a smaller seed."
            )
        self._check_rates()
        self._check_rows()
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

    def _check_rows(self) -> None:
        if self.rows and self.lr_from:
            raise ValueError("rows with lr_from: each row states its own learning rates. Leave one out.")
        for name, row in self.rows.items():
            if set(name) & set(":,*?"):
                raise ValueError(f"rows: {name!r}: a row's name has no colon, comma or wildcard.")
            if several := sorted(COMMON & row.settings.keys()):
                raise ValueError(f"rows: {name}: {several[0]} is one for all rows. State it beside rows.")
            if "algorithm" not in row.settings:
                raise ValueError(f"rows: {name}: a row states its algorithm.")
            if not isinstance(row.settings.get("options", {}), Mapping):
                raise ValueError(f"rows: {name}: options: give each rule its options, as RULE: {{NAME: VALUE}}.")
            try:
                algorithm = self.row(name).algorithm
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                at = ".".join(map(str, first["loc"]))
                message = str(first["msg"]).removeprefix("Value error, ").replace("Input should be", "it must be")
                message = "there is no such field" if first["type"] == "extra_forbidden" else message
                raise ValueError(f"rows: {name}: {at + ': ' if at else ''}{message}") from None
            if len(algorithm) != 1:
                raise ValueError(f"rows: {name}: a row is of one rule. Make a row for each algorithm.")

    def row(self, name: str) -> "GridSpec":
        """The grid that a row is. Raises KeyError, and ValidationError for settings that are none."""
        common = self.model_dump(exclude={"rows", "lr_from", "options", "imbalance_factor"}, mode="json")
        if self.skew_type != ("none",):
            common["imbalance_factor"] = self.imbalance_factor
        settings = dict(self.rows[name].settings)
        options = settings.pop("options", {})
        algorithm = settings["algorithm"]
        known = algorithm if isinstance(algorithm, list | tuple) else [algorithm]
        shared = {rule: given for rule, given in self.options.items() if rule in known}
        return GridSpec.model_validate({**common, "options": shared | options, **settings})

    def with_rows(self, rows: Mapping[str, Row]) -> "GridSpec":
        """The same with other rows."""
        rules = tuple(dict.fromkeys(str(row.settings["algorithm"]) for row in rows.values()))
        return self.model_copy(update={"rows": dict(rows), "algorithm": rules})

    def grids(self) -> "dict[str, GridSpec]":
        """The grids that it consists of: that of each row, or itself."""
        return {name: self.row(name) for name in self.rows} or {"": self}

    @property
    def awaits_rates(self) -> bool:
        """Whether learning rates must be taken from an earlier phase before there can be a plan."""
        return self.objective.startswith("val_") and not self.lr_from and "lr" not in self.model_fields_set

    @model_serializer(mode="wrap")
    def _one_source_of_rates(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Either `lr` or `lr_from`, so that what is written down says what holds."""
        fields: dict[str, Any] = dump(self)
        fields.pop("lr" if self.lr_from else "lr_from", None)
        if not self.rows:
            fields.pop("rows", None)
        return fields


TUNABLE = tuple(
    name for name in GridSpec.model_fields if name in set(RunSpec.model_fields) - set(Settings.model_fields)
)

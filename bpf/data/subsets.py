"""Which training examples a run sees: a stratified fraction, a validation split, a class imbalance."""

import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bpf.errors import UsageError, did_you_mean

Indices = npt.NDArray[np.int64]

SKEW_TYPES = ("none", "long_tailed", "step")


@dataclass(frozen=True, eq=False)
class Subset:
    """Positions in the training set, int64 and ascending; `val` is empty without a validation split."""

    train: Indices
    val: Indices


def subset(
    labels: npt.NDArray[np.int64],
    *,
    examples_frac: float,
    val_frac: float,
    skew_type: str | None,
    imbalance_factor: float | None,
    data_seed: int,
) -> Subset:
    """Choose examples from `labels` int64 [N]; the same arguments give the same choice.

    In this order: `examples_frac` of each class (0 and 1 keep all); `val_frac` of each class of that for
    validation (0 for none; one example per class always stays in training); and, on the training part only,
    the imbalance `skew_type` with `imbalance_factor` = most frequent over least frequent class. Each step
    draws from its own generator.

    Raises UsageError, naming the fields, for values out of range and for combinations that leave nothing.
    """
    _check(examples_frac, val_frac, skew_type, imbalance_factor, data_seed)
    chosen = np.arange(len(labels), dtype=np.int64)
    if 0 < examples_frac < 1:
        chosen = _fraction(labels, examples_frac, data_seed)
    val = np.empty(0, dtype=np.int64)
    if val_frac > 0:
        chosen, val = _validation(labels, chosen, val_frac, data_seed)
    if skew_type not in (None, "none") and imbalance_factor is not None:
        per_class = class_sizes(np.bincount(labels[chosen]), skew_type, imbalance_factor)
        chosen = chosen[_draw(labels[chosen], per_class, generator(data_seed, "skew"))]
    return Subset(train=chosen, val=val)


def stratified_split(labels: npt.NDArray[np.int64], count: int, seed: int) -> tuple[Indices, Indices]:
    """(rest, taken): take about `count` positions with the class shares of `labels` int64 [N].

    One example of every class stays in the rest, so fewer than `count` are taken where classes are tiny.
    """
    counts = np.bincount(labels)
    sizes = np.minimum(_shares(counts, count), np.maximum(counts - 1, 0))
    taken = _draw(labels, sizes, generator(seed, "split"))
    rest = np.ones(len(labels), dtype=bool)
    rest[taken] = False
    return np.flatnonzero(rest), taken


def class_sizes(counts: Indices, skew_type: str | None, factor: float) -> Indices:
    """How many examples of each class an imbalanced training set keeps, int64 [C], at least 1 each.

    `long_tailed`: n_i = n_max * factor^(-i / (C - 1)) (Cui et al. 2019, section 5.1). `step`: classes below
    the median class index keep n_max, the others n_max / factor (Buda et al. 2018, section 3.1). Classes are
    ordered by label; n_max is the largest for which every class has enough, `counts` int64 [C]. Classes
    without examples keep none and take no place in the order.
    """
    occurring = np.flatnonzero(counts)
    order = np.arange(len(occurring))
    last = max(len(occurring) - 1, 1)
    if skew_type == "long_tailed":
        shares = float(factor) ** (-order / last)
    else:
        shares = np.where(order < last / 2, 1.0, 1.0 / factor)
    largest = float((counts[occurring] / shares).min())
    rounding = 1e-9  # 5000 * 10**-1 must not become 499
    sizes = np.zeros(len(counts), dtype=np.int64)
    sizes[occurring] = np.maximum(np.floor(largest * shares + rounding), 1)
    return sizes


def generator(seed: int, purpose: str) -> np.random.Generator:
    """A generator of its own for each purpose, so that one choice never shifts another."""
    return np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(purpose.encode())]))


def _check(
    examples_frac: float,
    val_frac: float,
    skew_type: str | None,
    imbalance_factor: float | None,
    data_seed: int,
) -> None:
    if not 0 <= examples_frac <= 1:
        raise UsageError(f"examples_frac is {examples_frac}; it must be from 0 to 1 (both mean all).")
    if not 0 <= val_frac < 1:
        raise UsageError(f"val_frac is {val_frac}; it must be at least 0 (no validation) and below 1.")
    if skew_type is not None and skew_type not in SKEW_TYPES:
        raise UsageError(f"Unknown skew_type {skew_type!r}.{did_you_mean(skew_type, SKEW_TYPES)}")
    skewed = skew_type not in (None, "none")
    if skewed and (imbalance_factor is None or not 1 <= imbalance_factor < float("inf")):
        raise UsageError(
            f"imbalance_factor is {imbalance_factor}; it must be at least 1 (most over least frequent class)."
        )
    if data_seed < 0:
        raise UsageError(f"data_seed is {data_seed}; it must be 0 or more.")


def _fraction(labels: npt.NDArray[np.int64], examples_frac: float, data_seed: int) -> Indices:
    counts = np.bincount(labels)
    total, classes = round(examples_frac * len(labels)), np.count_nonzero(counts)
    if total < classes:
        raise UsageError(
            f"examples_frac {examples_frac} of {len(labels)} training examples is {total}, fewer than the "
            f"{classes} classes; use at least {classes / len(labels):.2g}."
        )
    sizes = np.clip(_shares(counts, total), np.minimum(counts, 1), counts)
    return _draw(labels, sizes, generator(data_seed, "examples"))


def _validation(
    labels: npt.NDArray[np.int64], chosen: Indices, val_frac: float, data_seed: int
) -> tuple[Indices, Indices]:
    count = round(val_frac * len(chosen))
    counts = np.bincount(labels[chosen])
    sizes = np.minimum(_shares(counts, count), np.maximum(counts - 1, 0))
    if sizes.sum() == 0:
        raise UsageError(
            f"val_frac {val_frac} of {len(chosen)} training examples leaves no validation example beside one "
            "training example per class; raise val_frac or examples_frac, or set val_frac to 0."
        )
    taken = _draw(labels[chosen], sizes, generator(data_seed, "validation"))
    return np.delete(chosen, taken), chosen[taken]


def _shares(counts: Indices, total: int) -> Indices:
    """`total` divided in proportion to `counts`, whole numbers by largest remainder (ties: lower label)."""
    exact = counts * (total / max(int(counts.sum()), 1))
    shares: Indices = np.floor(exact).astype(np.int64)
    missing = total - int(shares.sum())
    shares[np.argsort(shares - exact, kind="stable")[:missing]] += 1
    return shares


def _draw(labels: npt.NDArray[np.int64], sizes: Indices, rng: np.random.Generator) -> Indices:
    """Positions of `sizes[c]` random examples of each class c, ascending."""
    drawn: list[Indices] = [rng.permutation(np.flatnonzero(labels == c))[:size] for c, size in enumerate(sizes)]
    chosen: Indices = np.sort(np.concatenate(drawn))
    return chosen

"""Subsets, validation splits and class imbalance."""

import numpy as np
import pytest

from bpf.data.subsets import class_sizes, stratified_split, subset
from bpf.errors import UsageError

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 100))
ALL = {"examples_frac": 1.0, "val_frac": 0.0, "skew_type": "none", "imbalance_factor": None, "data_seed": 0}


def choose(labels=LABELS, **changes):
    return subset(labels, **(ALL | changes))


def counts(indices, labels=LABELS):
    return np.bincount(labels[indices], minlength=10).tolist()


@pytest.mark.parametrize("examples_frac", [0, 1])
def test_fractions_0_and_1_keep_everything_in_order(examples_frac):
    chosen = choose(examples_frac=examples_frac)
    assert chosen.train.tolist() == list(range(1000))
    assert chosen.val.dtype == np.int64
    assert chosen.val.tolist() == []


def test_fraction_and_validation_keep_the_class_shares():
    chosen = choose(examples_frac=0.5, val_frac=0.2)
    assert counts(chosen.train) == [40] * 10
    assert counts(chosen.val) == [10] * 10
    assert not set(chosen.train) & set(chosen.val)
    assert np.all(np.diff(chosen.train) > 0)
    assert np.all(np.diff(chosen.val) > 0)


def test_sizes_add_up_where_shares_are_not_whole():
    labels = np.repeat(np.arange(3), [7, 11, 13])
    chosen = choose(labels, examples_frac=0.5, val_frac=0.25)
    assert len(chosen.train) + len(chosen.val) == round(0.5 * 31)
    assert len(chosen.val) == round(0.25 * 16)


def test_every_class_keeps_an_example_for_training():
    labels = np.repeat(np.arange(3), [1, 2, 100])
    chosen = choose(labels, val_frac=0.9)
    assert np.bincount(labels[chosen.train]).min() >= 1
    assert np.bincount(choose(labels, examples_frac=0.05).train, minlength=1).sum() >= 3
    assert set(labels[choose(labels, examples_frac=0.05).train]) == {0, 1, 2}


def test_the_seed_decides_and_each_step_has_its_own_generator():
    one, same, other = (choose(examples_frac=0.5, val_frac=0.2, data_seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.train, same.train)
    assert np.array_equal(one.val, same.val)
    assert not np.array_equal(one.val, other.val)
    skewed = choose(examples_frac=0.5, val_frac=0.2, data_seed=1, skew_type="step", imbalance_factor=4.0)
    assert np.array_equal(skewed.val, one.val)
    assert set(skewed.train) < set(one.train)


def test_long_tailed_follows_cui_et_al():
    chosen = choose(skew_type="long_tailed", imbalance_factor=100.0)
    assert counts(chosen.train) == [int(100 * 100 ** (-i / 9) + 1e-9) for i in range(10)]
    assert counts(chosen.train)[0] / counts(chosen.train)[-1] == 100


def test_step_follows_buda_et_al():
    assert counts(choose(skew_type="step", imbalance_factor=10.0).train) == [100] * 5 + [10] * 5
    assert class_sizes(np.full(5, 100), "step", 10.0).tolist() == [100, 100, 10, 10, 10]


def test_uneven_classes_still_reach_the_factor():
    sizes = class_sizes(np.array([50, 100, 100]), "long_tailed", 4.0)
    assert sizes.tolist() == [50, 25, 12]
    sizes = class_sizes(np.array([100, 100, 10]), "long_tailed", 4.0)
    assert sizes.tolist() == [40, 20, 10]


def test_a_factor_beyond_the_data_leaves_one_example():
    assert class_sizes(np.full(3, 10), "long_tailed", 1e4).tolist() == [10, 1, 1]


def test_the_validation_split_is_not_skewed():
    chosen = choose(val_frac=0.1, skew_type="long_tailed", imbalance_factor=10.0)
    assert counts(chosen.val) == [10] * 10
    assert counts(chosen.train)[0] == 90
    assert counts(chosen.train)[-1] == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"examples_frac": 1.5}, "examples_frac is 1.5; it must be from 0 to 1 (both mean all)."),
        ({"val_frac": 1.0}, "val_frac is 1.0; it must be at least 0 (no validation) and below 1."),
        ({"data_seed": -1}, "data_seed is -1; it must be 0 or more."),
        ({"skew_type": "steps"}, "Unknown skew_type 'steps'. Did you mean 'step'?"),
        (
            {"skew_type": "step", "imbalance_factor": 0.5},
            "imbalance_factor is 0.5; it must be at least 1 (most over least frequent class).",
        ),
        (
            {"skew_type": "step"},
            "imbalance_factor is None; it must be at least 1 (most over least frequent class).",
        ),
        (
            {"examples_frac": 0.005},
            "examples_frac 0.005 of 1000 training examples is 5, fewer than the 10 classes; use at least 0.01.",
        ),
        (
            {"examples_frac": 0.01, "val_frac": 0.5},
            "val_frac 0.5 of 10 training examples leaves no validation example beside one training example "
            "per class; raise val_frac or examples_frac, or set val_frac to 0.",
        ),
        (
            {"examples_frac": 0.1, "val_frac": 0.001},
            "val_frac 0.001 of 100 training examples leaves no validation example beside one training "
            "example per class; raise val_frac or examples_frac, or set val_frac to 0.",
        ),
    ],
)
def test_what_cannot_work_names_the_fields(changes, message):
    with pytest.raises(UsageError) as caught:
        choose(**changes)
    assert str(caught.value) == message


def test_stratified_split_takes_the_count_it_is_asked_for():
    rest, taken = stratified_split(LABELS, 203, 0)
    assert (len(rest), len(taken)) == (797, 203)
    assert sorted(counts(taken)) == [20] * 7 + [21] * 3
    assert sorted([*rest, *taken]) == list(range(1000))


def test_what_is_left_over_goes_to_the_largest_remainders():
    labels = np.repeat(np.arange(3), [10, 11, 19])
    assert np.bincount(labels[stratified_split(labels, 4, 0)[1]]).tolist() == [1, 1, 2]

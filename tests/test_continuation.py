"""What is kept of runs that have left their cohort: the best networks, and ends from which more epochs can go on."""

import dataclasses
import io

import pytest
import torch
import torch.nn.functional as F

from bpf.data import cache
from bpf.experiment.plugins import load_rules
from bpf.spec.run import RunSpec
from bpf.training import steps
from bpf.training.cohort import Cohort

RULES = load_rules(["bp", "dfa", "drtp", "ll-cce"])
# All that the runs of a cohort may differ in, and in no sorted order.
DIFFERENT = [
    {"lr": 0.03, "bw_init": "ortho", "seed": 0},
    {"lr": 0.001, "weight_decay": 0.01, "bw_init": "lecun", "dropout": 0.3, "seed": 1},
    {"lr": 0.03, "weight_decay": 0.01, "bw_init": "nokland", "dropout": 0.1, "seed": 1},
    {"lr": 0.001, "bw_init": "frenkel", "seed": 5},
    {"lr": 0.03, "bw_init": "principled", "dropout": 0.5, "seed": 0},
]
# With these rates the objective gets worse after a while, in different epochs for different seeds.
WORSENING = [{"lr": lr, "seed": seed} for lr, seed in ((0.1, 0), (0.001, 1), (0.1, 2), (0.3, 3), (0.03, 4))]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return cache.load("digits", tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def spec(algorithm="bp", **changes):
    small = {"dataset": "digits", "arch": "24-16", "epochs": 6, "examples_frac": 0.2, "objective": "val_loss"}
    return RunSpec.model_validate(small | {"algorithm": algorithm} | changes)


def worsening(**changes):
    return [spec("dfa", optimizer="sgd", batch_norm=True, **changes, **own) for own in WORSENING]


def explosive(lr, seed):
    """Raw pixels, no squash and units that do not die: plain gradient descent with a large step blows up."""
    raw = {"problem_type": "reconstruction", "scaler": "identity", "activation": "lrelu"}
    return spec(**raw, optimizer="sgd", objective="loss", lr=lr, seed=seed)


def with_epochs(specs, epochs):
    return [own.model_copy(update={"epochs": epochs}) for own in specs]


def cohort(specs, data, **options):
    return Cohort(specs, RULES[specs[0].algorithm], data, **options)


def train(trained, until=None):
    while not trained.done and trained.epoch != until:
        trained.run_epoch()
    return trained


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def facts(trained):
    """Every record without its time, NaN made equal to itself."""
    return [repr(dataclasses.asdict(record) | {"seconds": None}) for record in trained.records]


def assert_equal(one, other):
    """Of nested dictionaries of tensors, that every bit is the same."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, dict):
            assert_equal(value, other[name])
        else:
            assert torch.equal(value, other[name]), name


def assert_goes_on(specs, data, *steps, **options):
    """Cohorts that take over from each other are one with the epochs of `specs`; returns that one.

    Each of `steps` is a number of epochs that the specs have for a while, and the epoch after which to end.
    """
    expected = train(cohort(specs, data, keep_final=True, **options))
    state = None
    for epochs, until in [*steps, (specs[0].epochs, None)]:
        own = cohort(with_epochs(specs, epochs), data, keep_final=True, **options)
        if state is not None:
            own.load(state)
        assert not own.done
        state = through_a_file(train(own, until).state())
    assert facts(own) == facts(expected)
    assert own.epoch == expected.epoch
    assert_equal(state["left"], expected.state()["left"])
    return expected


# The best network


def logits(network, x):
    """As anyone would write it; batch norm with its running statistics."""
    last = max(int(name.partition(".")[2]) for name in network)
    for k in range(last):
        x = F.linear(x, network[f"weight.{k}"], network[f"bias.{k}"].squeeze(0))
        own = (network[f"{name}.{k}"].squeeze(0) for name in ("mean", "variance", "scale", "shift"))
        x = torch.tanh(F.batch_norm(x, *own))
    return F.linear(x, network[f"weight.{last}"], network[f"bias.{last}"].squeeze(0))


def test_the_best_network_is_the_one_that_was_tested(digits):
    trained = train(cohort(worsening(early_stopping=2, epochs=12), digits))
    assert len({record.epochs for record in trained.records}) >= 3
    x, y = (digits.test_images.flatten(1).float() - 127.5) / 127.5, digits.test_labels
    for run, record in enumerate(trained.records):
        network = trained.best_network(run)
        found = logits(network, x)
        assert (found.argmax(1) != y).float().mean().item() == pytest.approx(record.test["error"])
        assert F.cross_entropy(found, y).item() == pytest.approx(record.test["loss"], rel=1e-5)
        assert network["weight.0"].shape == (24, 64)
        assert network["variance.1"].shape == network["bias.1"].shape == (1, 16)
        assert set(network) == {f"{n}.{k}" for n in ("scale", "shift", "mean", "variance") for k in (0, 1)} | {
            f"{n}.{k}" for n in ("weight", "bias") for k in (0, 1, 2)
        }
    assert any(record.best_epoch < record.epochs for record in trained.records)


def test_only_complete_runs_have_a_best_network(digits):
    trained = cohort([explosive(1e-5, 0), explosive(10.0, 1)], digits)
    trained.run_epoch()
    assert [record.status for record in trained.records] == ["running", "diverged"]
    for run in (0, 1):
        with pytest.raises(KeyError):
            trained.best_network(run)
    train(trained)
    assert trained.best_network(0)
    for run in (1, 2, -1):
        with pytest.raises(KeyError):
            trained.best_network(run)


@pytest.mark.parametrize("until", [6, 9, None])
def test_best_networks_survive_a_file(until, digits):
    specs = worsening(early_stopping=2, epochs=12)
    expected = train(cohort(specs, digits))
    stopped = train(cohort(specs, digits), until)
    complete = [run for run, record in enumerate(stopped.records) if record.status == "complete"]
    assert complete
    resumed = cohort(specs, digits)
    resumed.load(through_a_file(stopped.state()))
    for run in complete:
        assert_equal(resumed.best_network(run), expected.best_network(run))
    train(resumed)
    for run in range(len(specs)):
        assert_equal(resumed.best_network(run), expected.best_network(run))


def test_a_state_is_what_it_was_when_training_goes_on(digits):
    trained = train(cohort(worsening(early_stopping=2, epochs=12), digits), 6)
    left = trained.state()["left"]
    before = set(left)
    assert before != set(train(trained).state()["left"])
    assert set(left) == before


@pytest.mark.parametrize("keep_final", [False, True])
def test_no_more_is_kept_than_asked_for(keep_final, digits):
    trained = train(cohort(worsening(early_stopping=2), digits, keep_final=keep_final))
    state = through_a_file(trained.state())
    assert set(state) == {"epoch", "stacked", "records", "left"}
    ended = [record.epochs - record.best_epoch < 2 for record in trained.records]
    assert set(ended) == {False, True}
    for run, at_its_end in enumerate(ended):
        kept = state["left"][run]
        assert set(kept) == ({"best", "network", "optimizer"} if keep_final and at_its_end else {"best"})
        tensors = [*kept["best"].values(), *kept.get("network", {}).values()]
        tensors += [tensor for own in kept.get("optimizer", {}).values() for tensor in own.values()]
        for tensor in tensors:
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, "a view of more"


# More epochs


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("optimizer", ["adam", "nag", "rmsprop"])
@pytest.mark.parametrize("algorithm", ["bp", "drtp", "ll-cce"])
def test_more_epochs_are_those_of_a_longer_run(algorithm, optimizer, batch_norm, digits):
    specs = [spec(algorithm, optimizer=optimizer, batch_norm=batch_norm, **changes) for changes in DIFFERENT]
    assert_goes_on(specs, digits, (3, None))


@pytest.mark.parametrize(
    "steps",
    [[(3, None)], [(2, None), (3, None)], [(4, 2)], [(2, 1), (3, None), (5, 4)]],
    ids=["once", "twice", "interrupted", "all of it"],
)
@pytest.mark.parametrize("layerwise", [False, True])
def test_however_often_it_goes_on(layerwise, steps, digits):
    specs = [spec("ll-cce", rotation=10, **changes) for changes in DIFFERENT]
    assert_goes_on(specs, digits, *steps, layerwise=layerwise)


def test_the_best_epoch_may_be_one_before_going_on(digits):
    expected = assert_goes_on(worsening(), digits, (4, None))
    assert {record.best_epoch <= 4 for record in expected.records} == {False, True}


@pytest.mark.parametrize("limit", range(1, 6))
def test_runs_that_diverge_stay_diverged(limit, digits):
    rates = [1e-5, 5e-5, 10.0, 1e-6, 1.0]  # the second takes a few epochs
    expected = assert_goes_on([explosive(lr, seed=1) for lr in rates], digits, (limit, None))
    ends = [(record.status, record.epochs) for record in expected.records]
    assert ends[0] == ends[3] == ("complete", 6)
    assert ends[2] == ends[4] == ("diverged", 1)


def test_a_run_may_diverge_after_it_went_on(digits):
    first = cohort(with_epochs([explosive(1e-5, 0), explosive(1e-5, 1)], 3), digits, keep_final=True)
    state = through_a_file(train(first).state())
    state["left"][0]["network"]["weight.1"].fill_(float("inf"))
    own = cohort([explosive(1e-5, 0), explosive(1e-5, 1)], digits)
    own.load(state)
    train(own)
    spoilt, sound = own.records
    assert (spoilt.status, spoilt.epochs, spoilt.test) == ("diverged", 4, None)
    assert (sound.status, sound.epochs) == ("complete", 6)
    with pytest.raises(KeyError):
        own.best_network(0)


@pytest.mark.parametrize("limit", range(3, 9))
def test_runs_that_stopped_early_stay_as_they_are(limit, digits, monkeypatch):
    # With so few rows at a time the number of runs that are tested together changes how a run's losses are summed.
    monkeypatch.setattr(steps, "EVALUATION_ROWS", 100)
    expected = assert_goes_on(worsening(early_stopping=2, epochs=9), digits, (limit, None))
    lengths = {record.epochs for record in expected.records}
    assert len(lengths) >= 3, lengths


def test_runs_that_stop_in_the_last_epoch_stop(digits):
    """They leave with those that their epochs end, and are not to go on with them."""
    specs = worsening(early_stopping=2, epochs=12)
    whole = train(cohort(specs, digits))
    limit = sorted(record.epochs for record in whole.records)[1]
    assert {record.epochs > limit for record in whole.records} == {False, True}
    first = train(cohort(with_epochs(specs, limit), digits, keep_final=True))
    own = cohort(specs, digits)
    own.load(through_a_file(first.state()))
    going_on = [record.status == "running" for record in own.records]
    assert going_on == [record.epochs > limit for record in whole.records]
    assert all((record.test is None) == (record.status == "running") for record in own.records)


def test_the_time_before_going_on_counts(digits):
    first = train(cohort([spec(epochs=2)], digits, keep_final=True))
    own = cohort([spec(epochs=3)], digits)
    own.load(through_a_file(first.state()))
    assert own.records[0].seconds == first.records[0].seconds
    with pytest.raises(KeyError):
        own.best_network(0)
    assert train(own).records[0].seconds > first.records[0].seconds


# What cannot go on


def test_runs_whose_end_was_not_kept_do_not_go_on(digits):
    specs = [spec(seed=seed, epochs=2) for seed in (0, 1)]
    state = through_a_file(train(cohort(specs, digits)).state())
    own = cohort(with_epochs(specs, 3), digits, keep_final=True)
    with pytest.raises(ValueError, match=r"^The final state of runs \[0, 1\] was not kept, so they cannot train for"):
        own.load(state)


def test_nothing_more_is_needed_of_runs_that_do_not_go_on(digits):
    specs = [own.model_copy(update={"early_stopping": 1}) for own in worsening() if own.lr >= 0.1]
    first = train(cohort(with_epochs(specs, 20), digits))
    assert max(record.epochs for record in first.records) < 20
    for epochs in (20, 30):
        own = cohort(with_epochs(specs, epochs), digits)
        own.load(through_a_file(first.state()))
        assert own.done
        assert facts(own) == facts(first)


def test_runs_that_ended_apart_do_not_go_on_together(digits):
    specs = [spec(epochs=2), spec(epochs=3, seed=1)]
    for until in (2, None):
        state = through_a_file(train(cohort(specs, digits, keep_final=True), until).state())
        with pytest.raises(ValueError, match="did not end together"):
            cohort(with_epochs(specs, 4), digits).load(state)


def test_states_of_before_best_networks_were_kept(digits):
    specs = worsening(early_stopping=2, epochs=12)
    expected = train(cohort(specs, digits))
    state = through_a_file(train(cohort(specs, digits), 6).state())
    del state["left"]
    own = cohort(specs, digits)
    own.load(state)
    before = [record.status == "complete" for record in own.records]
    assert set(before) == {False, True}
    train(own)
    assert facts(own) == facts(expected)
    for run, lost in enumerate(before):
        if lost:
            with pytest.raises(KeyError):
                own.best_network(run)
        else:
            assert_equal(own.best_network(run), expected.best_network(run))

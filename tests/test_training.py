"""The training loop on the embedded digits: against plain torch, stacked and alone, resumed, and its bookkeeping."""

import dataclasses
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bpf.algorithms.bp import Backpropagation
from bpf.data import cache
from bpf.data.subsets import subset
from bpf.errors import UsageError
from bpf.experiment.plugins import load_rules
from bpf.nn import optim
from bpf.nn.layer import Structure
from bpf.nn.network import Network
from bpf.nn.optim import StackedOptimizer
from bpf.nn.randomness import Clock, Draws, Dropout, generator, orders
from bpf.spec import schedules
from bpf.spec.run import RunSpec
from bpf.training import cohort as training
from bpf.training import hardware
from bpf.training.cohort import DIVERGED_LOSS, Cohort
from bpf.training.feed import Feed

RULES = load_rules(["bp", "dfa", "drtp", "ll-cce", "ll-mse"])
LAYERWISE = ("drtp", "ll-cce", "ll-mse")
OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": lambda parameters, **options: torch.optim.SGD(parameters, momentum=0.9, **options),
    "nag": lambda parameters, **options: torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **options),
    "rmsprop": torch.optim.RMSprop,
}
# All that the runs of a cohort may differ in, and in no sorted order.
DIFFERENT = [
    {"lr": 0.01, "bw_init": "ortho", "seed": 0},
    {"lr": 0.001, "weight_decay": 0.01, "bw_init": "lecun", "dropout": 0.3, "seed": 1},
    {"lr": 0.01, "weight_decay": 0.01, "bw_init": "nokland", "dropout": 0.1, "seed": 1},
    {"lr": 0.001, "bw_init": "frenkel", "seed": 5},
    {"lr": 0.01, "bw_init": "principled", "dropout": 0.5, "seed": 0},
]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return cache.load("digits", tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_worker_computes_in_one_thread():
    torch.set_num_threads(2)
    try:
        hardware.settle(torch.device("cpu"))
        assert torch.get_num_threads() == 1
        assert torch.tensor(1e-40).mul(1) == 0
    finally:
        torch.set_flush_denormal(False)


def spec(algorithm="bp", **changes):
    small = {"dataset": "digits", "arch": "24-16", "epochs": 4, "examples_frac": 0.2, "objective": "val_loss"}
    return RunSpec.model_validate(small | {"algorithm": algorithm} | changes)


def cohort(specs, data, **options):
    return Cohort(specs, RULES[specs[0].algorithm], data, **options)


def train(specs, data, **options):
    trained = cohort(specs, data, **options)
    while not trained.done:
        trained.run_epoch()
    return trained


def weights(trained):
    """Each stacked run's parameters and running statistics, by the run's place in the cohort."""
    state = trained.state()
    return {run: {n: t[i].clone() for n, t in state["network"].items()} for i, run in enumerate(state["stacked"])}


def network(trained):
    """The network of a cohort of one run that was made with `keep_final`, whether it has left or not."""
    state = trained.state()
    return state["left"][0]["network"] if trained.done else {n: t[0] for n, t in state["network"].items()}


def facts(record):
    """A record without its time, NaN made equal to itself."""
    return repr({name: value for name, value in dataclasses.asdict(record).items() if name != "seconds"})


def assert_close_records(got, expected, loss, error):
    for name in ("seed", "status", "epochs", "best_epoch"):
        assert getattr(got, name) == getattr(expected, name)
    assert set(got.history) == set(expected.history)
    for name, values in expected.history.items():
        tolerance = {"abs": error} if name.endswith("error") else {"rel": loss}
        assert got.history[name] == pytest.approx(values, nan_ok=True, **tolerance), name
    for part in ("train", "val", "test"):
        scores = getattr(expected, part)
        if scores is None:
            assert getattr(got, part) is None
        else:
            assert getattr(got, part)["loss"] == pytest.approx(scores["loss"], rel=loss)
            assert getattr(got, part)["error"] == pytest.approx(scores["error"], abs=error)
    assert got.objective == pytest.approx(expected.objective, rel=loss)


# Against plain torch


class Plain:
    """One run as anyone would write it: functional layers, autograd, torch.optim; only random draws are shared."""

    def __init__(self, run, data):
        self.run = run
        structure = Structure(64, run.widths, 10, run.activation, run.batch_norm, run.use_bias, run.init)
        network = Network.build(structure, [run.seed], [run.bw_init], torch.float64)
        self.parameters = {name: t[0].squeeze(0).clone().requires_grad_() for name, t in network.parameters.items()}
        self.running = {n: t[0, 0].clone() for n, t in network.buffers.items() if not n.startswith("feedback")}
        self.feedback = [network.buffers[f"feedback.{k}"][0] for k in range(len(run.widths))]
        labels = data.train_labels
        chosen = subset(
            labels.numpy(),
            examples_frac=run.examples_frac,
            val_frac=run.val_frac,
            skew_type="none",
            imbalance_factor=1.0,
            data_seed=run.data_seed,
        )
        pixels = (data.train_images.double().flatten(1) - 127.5) / 127.5
        self.train, self.val = ((pixels[part], labels[part]) for part in (chosen.train, chosen.val))
        self.test = (data.test_images.double().flatten(1) - 127.5) / 127.5, data.test_labels
        self.optimizer = OPTIMIZERS[run.optimizer](self.parameters.values(), lr=run.lr, weight_decay=run.weight_decay)

    def forward(self, x, y=None, masks=None):
        """Logits, and the local losses of ll-cce where there are labels."""
        own, local = self.parameters, 0.0
        for k in range(len(self.run.widths)):
            a = F.linear(x, own[f"weight.{k}"], None if self.run.batch_norm else own.get(f"bias.{k}"))
            if self.run.batch_norm:
                statistics = self.running[f"mean.{k}"], self.running[f"variance.{k}"]
                a = F.batch_norm(a, *statistics, own[f"scale.{k}"], own[f"shift.{k}"], training=y is not None)
            h = torch.tanh(a)
            x = h
            if masks is not None:
                mask = masks.mask(k, len(h), h.shape[1])
                x = h if mask is None else h * mask[0]
            if self.run.algorithm == "ll-cce" and y is not None:
                local = local + F.cross_entropy(h @ self.feedback[k], y)
                x = x.detach()
        k = len(self.run.widths)
        return F.linear(x, own[f"weight.{k}"], own.get(f"bias.{k}")), local

    def epoch(self, number):
        x, y = self.train
        clock = Clock(torch.device("cpu"))
        clock.begin(number)
        draws = Draws([self.run.seed], clock, torch.float64)
        masks = Dropout([self.run.dropout], draws, torch.device("cpu"), torch.float64)
        on_inputs = Dropout([self.run.input_dropout], draws, torch.device("cpu"), torch.float64)
        losses, wrong = 0.0, 0
        order = orders([self.run.seed], len(y), number)[0] if self.run.shuffle else torch.arange(len(y))
        for rows in order.split(self.run.batch_size):
            mask = on_inputs.mask("inputs", len(rows), 64)
            logits, local = self.forward(x[rows] if mask is None else x[rows] * mask[0], y[rows], masks)
            loss = F.cross_entropy(logits, y[rows])
            self.optimizer.zero_grad()
            (loss + local).backward()
            self.optimizer.step()
            clock.tick()
            losses += loss.item() * len(rows)
            wrong += (logits.argmax(1) != y[rows]).sum().item()
        return losses / len(y), wrong / len(y)

    def scores(self, part):
        with torch.no_grad():
            logits, _ = self.forward(part[0])
        return F.cross_entropy(logits, part[1]).item(), (logits.argmax(1) != part[1]).double().mean().item()


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("algorithm", ["bp", "ll-cce"])
def test_training_is_that_of_a_plain_loop(algorithm, optimizer, batch_norm, digits):
    changes = {"input_dropout": 0.3, "shuffle": False} if optimizer == "sgd" else {}
    changes |= {"batch_norm": batch_norm, "weight_decay": 0.01, "dropout": 0.2, "batch_size": 50}
    run = spec(algorithm, optimizer=optimizer, **changes)
    plain, trained = Plain(run, digits), cohort([run], digits, dtype=torch.float64, keep_final=True)
    record = trained.records[0]
    for epoch in range(run.epochs):
        loss, error = plain.epoch(epoch)
        val_loss, val_error = plain.scores(plain.val)
        trained.run_epoch()
        assert [record.history[name][-1] for name in ("loss", "error", "val_loss", "val_error")] == pytest.approx(
            [loss, error, val_loss, val_error], rel=1e-8
        )
    assert trained.done
    for name, tensor in network(trained).items():
        mine = plain.running[name] if name in plain.running else plain.parameters[name].detach()
        torch.testing.assert_close(tensor.squeeze(0), mine, rtol=1e-7, atol=1e-8)
    test_loss, test_error = plain.scores(plain.test)
    if record.best_epoch == run.epochs:
        assert record.test == pytest.approx({"loss": test_loss, "error": test_error}, rel=1e-8)


# Stacked and alone


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("algorithm", RULES)
def test_a_cohort_is_its_runs_alone(algorithm, optimizer, batch_norm, digits):
    specs = [spec(algorithm, optimizer=optimizer, batch_norm=batch_norm, **changes) for changes in DIFFERENT]
    together = cohort(specs, digits, dtype=torch.float64)
    for _ in range(3):
        together.run_epoch()
    found = weights(together)
    together.run_epoch()
    assert together.done
    for run, own in enumerate(specs):
        alone = cohort([own], digits, dtype=torch.float64)
        for _ in range(3):
            alone.run_epoch()
        for name, tensor in weights(alone)[0].items():
            # Batch norm cancels a pixel that is almost constant, as it cancels a bias: the gradient of its weight is
            # rounding, which Adam divides by its own size + 1e-8.
            noisy = name == "weight.0" and batch_norm and optimizer in ("adam", "adamw")
            torch.testing.assert_close(found[run][name], tensor, rtol=1e-7, atol=1e-7 if noisy else 1e-8, msg=name)
        alone.run_epoch()
        assert_close_records(together.records[run], alone.records[0], loss=1e-8, error=1e-12)
    assert len({record.objective for record in together.records}) == len(specs)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_cohort_is_its_runs_alone_in_single_precision(optimizer, batch_norm, digits):
    specs = [spec("dfa", optimizer=optimizer, batch_norm=batch_norm, epochs=2, **changes) for changes in DIFFERENT]
    together = train(specs, digits)
    for run, own in enumerate(specs):
        assert_close_records(together.records[run], train([own], digits).records[0], loss=2e-3, error=0.02)


def test_runs_do_not_depend_on_the_order_of_the_cohort(digits):
    specs = [spec("dfa", **changes) for changes in DIFFERENT]
    forward = train(specs, digits, dtype=torch.float64).records
    backward = train(specs[::-1], digits, dtype=torch.float64).records[::-1]
    for one, other in zip(forward, backward, strict=True):
        assert_close_records(one, other, loss=1e-8, error=1e-12)


def explosive(seed, lr):
    """Raw pixels, no squash and relu: plain gradient descent with a large step blows up."""
    return spec(
        problem_type="reconstruction",
        scaler="identity",
        activation="relu",
        optimizer="sgd",
        objective="loss",
        epochs=8,
        lr=lr,
        seed=seed,
    )


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_diverged_run_leaves_and_the_others_go_on_unharmed(layerwise, digits):
    specs = [explosive(0, 1e-5), explosive(0, 10.0), explosive(1, 1e-6), explosive(1, 1.0), explosive(2, 1e-5)]
    together = cohort(specs, digits, dtype=torch.float64, layerwise=layerwise)
    together.run_epoch()
    assert [record.status for record in together.records] == ["running", "diverged", "running", "diverged", "running"]
    assert set(weights(together)) == {0, 2, 4}
    while not together.done:
        together.run_epoch()
    for run, own in enumerate(specs):
        alone = train([own], digits, dtype=torch.float64).records[0]
        mine = together.records[run]
        if own.lr >= 1:
            assert (mine.status, mine.epochs, mine.best_epoch) == ("diverged", 1, 0)
            assert (mine.objective, mine.train, mine.val, mine.test) == (None, None, None, None)
            assert not mine.history["loss"][0] + mine.history["val_loss"][0] < DIVERGED_LOSS
            assert (alone.status, alone.epochs) == ("diverged", 1)
        else:
            assert mine.status == "complete"
            assert mine.epochs == 8
            assert mine.history["loss"] == pytest.approx(alone.history["loss"], rel=1e-7)
            assert mine.test["loss"] == pytest.approx(alone.test["loss"], rel=1e-7)
            assert mine.test["error"] is None
            assert mine.history["loss"][-1] < 0.7 * mine.history["loss"][0]


def test_a_loss_beyond_all_use_is_divergence(digits, monkeypatch):
    whole = train([explosive(0, 1e-5)], digits).records[0]
    least, most = min(whole.history["loss"]), max(whole.history["loss"])
    assert whole.status == "complete"
    monkeypatch.setattr(training, "DIVERGED_LOSS", (least + most) / 2)
    lost = train([explosive(0, 1e-5)], digits).records[0]
    assert (lost.status, lost.test, lost.epochs) == ("diverged", None, 1)
    assert math.isfinite(lost.history["loss"][0])


def test_errors_are_fractions_of_whole_examples(digits):
    trained = train([spec(epochs=2)], digits)
    (record,), feed = trained.records, trained._feed
    errors = {"train": record.history["error"], "val": record.history["val_error"], "test": [record.test["error"]]}
    for part, found in errors.items():
        count = len(getattr(feed, part))
        assert set(found) <= {wrong / count for wrong in range(count + 1)}


def test_a_run_that_diverges_late_keeps_its_history(digits):
    together = cohort([explosive(0, 1e-5), explosive(1, 1e-5)], digits, dtype=torch.float64)
    together.run_epoch()
    state = together.state()
    state["network"]["weight.1"][state["stacked"].index(0)] = float("inf")
    together.run_epoch()
    spoilt, sound = together.records
    assert (spoilt.status, spoilt.epochs, spoilt.best_epoch, len(spoilt.history["loss"])) == ("diverged", 2, 1, 2)
    assert spoilt.objective == spoilt.history["loss"][0]
    assert spoilt.test is None
    while not together.done:
        together.run_epoch()
    alone = train([explosive(1, 1e-5)], digits, dtype=torch.float64).records[0]
    assert sound.history["loss"] == pytest.approx(alone.history["loss"], rel=1e-7)
    assert spoilt.epochs == 2


def test_weights_that_overflow_in_the_last_step_are_noticed(digits):
    """No loss has seen them yet, and there is no validation split that would."""

    class Overflowing(Backpropagation):
        def gradients(self, step):
            super().gradients(step)
            step.network.gradients["weight.1"][0, 0, 0] = float("inf")

    runs = [spec(val_frac=0, objective="loss", optimizer="sgd", batch_size=1000, lr=lr) for lr in (0.01, 0.1)]
    cohort = Cohort(runs, Overflowing, digits)
    cohort.run_epoch()
    overflowed, sound = cohort.records
    assert math.isfinite(overflowed.history["loss"][0])
    assert (overflowed.status, overflowed.test) == ("diverged", None)
    assert sound.status == "running"


# With these rates the objective gets worse after a while, in different epochs for different seeds.
STOPPING = [{"lr": lr, "seed": seed} for lr, seed in ((0.1, 0), (0.001, 1), (0.1, 2), (0.3, 3), (0.03, 4))]


def stopping(**changes):
    common = {"optimizer": "sgd", "epochs": 12, "early_stopping": 2, "batch_norm": True} | changes
    return [spec("dfa", **common, **own) for own in STOPPING]


@pytest.mark.parametrize(("optimizer", "patience"), [("sgd", 2), ("adam", 1)])
def test_early_stopping_takes_runs_out_one_by_one(optimizer, patience, digits):
    specs = stopping(optimizer=optimizer, early_stopping=patience)
    together = train(specs, digits, dtype=torch.float64)
    lengths = [record.epochs for record in together.records]
    assert len(set(lengths)) >= 3, lengths
    for record, own in zip(together.records, specs, strict=True):
        assert record.status == "complete"
        values = record.history["val_loss"]
        assert len(values) == record.epochs
        assert record.best_epoch == int(np.argmin(values)) + 1
        assert record.epochs == min(12, record.best_epoch + patience)
        so_far = [min(values[: i + 1]) for i in range(len(values))]
        assert all(so_far[i] < so_far[i - patience] for i in range(patience, len(values) - 1))
        assert_close_records(record, train([own], digits, dtype=torch.float64).records[0], loss=1e-6, error=1e-12)


# Layer by layer


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("algorithm", LAYERWISE)
def test_layerwise_updates_give_the_same_numbers(algorithm, optimizer, digits):
    common = {"optimizer": optimizer, "batch_norm": True, "early_stopping": 2, "epochs": 5}
    specs = [spec(algorithm, **common, **changes) for changes in DIFFERENT]
    at_once, layerwise = (cohort(specs, digits, layerwise=flag) for flag in (False, True))
    while not at_once.done:
        at_once.run_epoch()
        layerwise.run_epoch()
        one, other = weights(at_once), weights(layerwise)
        assert set(one) == set(other)
        for run in one:
            assert all(torch.equal(one[run][name], other[run][name]) for name in one[run])
    assert layerwise.done
    assert [facts(record) for record in layerwise.records] == [facts(record) for record in at_once.records]


@pytest.mark.parametrize("algorithm", ["bp", "dfa"])
def test_layerwise_is_ignored_by_rules_that_cannot(algorithm, digits):
    specs = [spec(algorithm, **changes) for changes in DIFFERENT[:2]]
    one, other = (train(specs, digits, layerwise=flag) for flag in (False, True))
    assert [facts(record) for record in one.records] == [facts(record) for record in other.records]


# Optimizers and resuming

RATES, DECAYS = [0.001, 0.001, 0.01, 0.01, 0.1], [0.0, 0.0, 0.0, 0.1, 0.1]


def stacked(name, layerwise=False):
    structure = Structure(6, (5, 4), 3, batch_norm=True, init="torch")
    network = Network.build(structure, range(5), ["ortho"] * 5, torch.float64)
    return network, StackedOptimizer(name, network, RATES, DECAYS, momentum=0.9, layerwise=layerwise)


def fill_gradients(network, step):
    for name, gradient in network.gradients.items():
        gradient.normal_(generator=generator(step, name))


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stacked_optimizers_are_torchs_on_each_run(name, layerwise):
    network, optimizer = stacked(name, layerwise)
    alone = [{n: t[run].clone().requires_grad_() for n, t in network.parameters.items()} for run in range(5)]
    theirs = [
        OPTIMIZERS[name](own.values(), lr=rate, weight_decay=decay)
        for own, rate, decay in zip(alone, RATES, DECAYS, strict=True)
    ]
    for step in range(5):
        fill_gradients(network, step)
        for layer in range(3 if layerwise else 1):
            optimizer.step(layer)
        for run in range(5):
            for n, parameter in alone[run].items():
                parameter.grad = network.gradients[n][run].clone()
            theirs[run].step()
    for run in range(5):
        for n, parameter in alone[run].items():
            torch.testing.assert_close(network.parameters[n][run], parameter.detach(), rtol=1e-10, atol=1e-12)


def test_momentum_is_the_one_given():
    network, _ = stacked("sgd")
    before = network.parameters["weight.0"].clone()
    optimizer = StackedOptimizer("nag", network, [0.1] * 5, [0.0] * 5, momentum=0.0)
    fill_gradients(network, 0)
    for _ in range(2):
        optimizer.step()
    torch.testing.assert_close(network.parameters["weight.0"], before - 0.2 * network.gradients["weight.0"])


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_states_are_taken_over_bit_by_bit(name, layerwise):
    network, optimizer = stacked(name, layerwise)
    other, _ = stacked(name, layerwise)

    def steps(network, optimizer, numbers):
        for step in numbers:
            fill_gradients(network, step)
            for layer in range(3 if layerwise else 1):
                optimizer.step(layer)

    steps(network, optimizer, range(3))
    for parameter, tensor in network.parameters.items():
        other.parameters[parameter].copy_(tensor)
    known = {n: {key: t.clone() for key, t in own.items()} for n, own in optimizer.state().items()}
    fresh = StackedOptimizer(name, other, RATES, DECAYS, momentum=0.9, layerwise=layerwise, state=known)
    steps(network, optimizer, range(3, 6))
    steps(other, fresh, range(3, 6))
    assert all(torch.equal(other.parameters[n], tensor) for n, tensor in network.parameters.items())
    assert set(optimizer.state()) == set(network.parameters)
    assert all(len(t) == 5 for state in optimizer.state().values() for t in state.values())
    assert optimizer.state()["weight.0"]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_resumes_everywhere(specs, data, **options):
    """From each epoch's state, a new cohort ends with the same records and the same weights on the way."""
    whole, states, on_the_way = cohort(specs, data, **options), [], []
    while not whole.done:
        states.append(through_a_file(whole.state()))
        whole.run_epoch()
        on_the_way.append(weights(whole))
    expected = [facts(record) for record in whole.records]
    for epoch, state in enumerate([*states, through_a_file(whole.state())]):
        resumed = cohort(specs, data, **options)
        resumed.load(state)
        assert resumed.epoch == epoch
        for later in on_the_way[epoch:]:
            resumed.run_epoch()
            now = weights(resumed)
            assert set(now) == set(later)
            assert all(torch.equal(now[run][name], later[run][name]) for run in later for name in later[run])
        assert resumed.done
        assert [facts(record) for record in resumed.records] == expected
    return whole


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resuming_goes_on_bit_by_bit(optimizer, layerwise, digits):
    specs = [spec("ll-cce", optimizer=optimizer, batch_norm=True, rotation=10, **changes) for changes in DIFFERENT]
    assert_resumes_everywhere(specs, digits, layerwise=layerwise)


def test_resuming_after_runs_have_stopped_early(digits):
    whole = assert_resumes_everywhere(stopping(), digits)
    assert len({record.epochs for record in whole.records}) >= 3


def test_resuming_after_a_run_has_diverged(digits):
    whole = assert_resumes_everywhere([explosive(0, 1e-5), explosive(1, 10.0), explosive(2, 1e-6)], digits)
    assert [record.status for record in whole.records] == ["complete", "diverged", "complete"]


# Learning and bookkeeping


@pytest.mark.parametrize("algorithm", RULES)
def test_every_rule_learns_the_digits(algorithm, digits):
    """Chance is 90 % test error; runs end between 3 and 7 %, and a rule that trains its last layer only does not."""
    whole = {"arch": "100-50", "epochs": 15, "examples_frac": 1.0, "objective": "loss", "lr": 0.003}
    record = train([spec(algorithm, **whole)], digits).records[0]
    assert record.status == "complete"
    assert record.test["error"] < 0.12
    assert record.train["error"] < 0.06
    assert record.history["loss"][-1] < 0.1 * record.history["loss"][0]


@pytest.mark.parametrize("algorithm", RULES)
def test_hidden_layers_learn_something_useful(algorithm, digits):
    """A narrow hidden layer of random features cannot do what a trained one does."""
    run = spec(algorithm, arch="10", epochs=15, examples_frac=1.0, objective="loss", lr=0.01)
    trained = cohort([run], digits)
    shallow = cohort([run], digits)
    first = {n: t.clone() for n, t in shallow.state()["network"].items() if n.endswith(".0")}
    for _ in range(run.epochs):
        trained.run_epoch()
        for name, tensor in first.items():
            shallow.state()["network"][name].copy_(tensor)
        shallow.run_epoch()
    assert trained.records[0].history["loss"][-1] < 0.75 * shallow.records[0].history["loss"][-1]


@pytest.mark.parametrize("scaler", ["standard", "zero_one"])
@pytest.mark.parametrize("algorithm", ["bp", "dfa", "ll-mse"])
def test_reconstruction_lowers_the_loss(algorithm, scaler, digits):
    whole = {"arch": "50", "examples_frac": 1.0, "objective": "loss", "epochs": 5, "lr": 0.003}
    record = train([spec(algorithm, problem_type="reconstruction", scaler=scaler, **whole)], digits).records[0]
    variance = digits.test_images.double().div(127.5 if scaler == "standard" else 255).var(0, correction=0).mean()
    assert record.history["loss"][-1] < 0.5 * record.history["loss"][0]
    assert record.test["loss"] < 0.8 * variance.item()
    assert record.test["error"] is None
    assert set(record.history) == {"loss", "val_loss"}


@pytest.mark.parametrize("objective", ["loss", "error", "val_loss", "val_error"])
def test_the_best_epoch_is_the_objectives_and_its_weights_are_tested(objective, digits):
    run = spec(objective=objective, lr=0.1, epochs=25, batch_norm=True, batch_size=50, data_seed=3, seed=1)
    plain, trained = Plain(run, digits), cohort([run], digits, dtype=torch.float64, keep_final=True)
    snapshots = []
    while not trained.done:
        trained.run_epoch()
        snapshots.append({name: tensor.squeeze(0).clone() for name, tensor in network(trained).items()})
    record = trained.records[0]
    assert {len(values) for values in record.history.values()} == {25}
    assert set(record.history) == {"loss", "error", "val_loss", "val_error"}
    values = record.history[objective]
    best = values.index(min(values))
    assert best < 24, "the last epoch is the best: the test shows nothing"
    assert (record.best_epoch, record.objective) == (best + 1, values[best])
    assert record.train == {name: record.history[name][best] for name in ("loss", "error")}
    assert record.val == {name: record.history[f"val_{name}"][best] for name in ("loss", "error")}

    def recomputed(epoch, part):
        for name, tensor in snapshots[epoch].items():
            (plain.running if name in plain.running else plain.parameters)[name].data.copy_(tensor)
        return dict(zip(("loss", "error"), plain.scores(part), strict=True))

    assert record.test == pytest.approx(recomputed(best, plain.test), rel=1e-9)
    assert record.val == pytest.approx(recomputed(best, plain.val), rel=1e-9)
    assert record.test["loss"] != pytest.approx(recomputed(24, plain.test)["loss"], rel=1e-3)


def test_the_last_network_is_kept_where_that_is_asked_for(digits):
    run = spec(lr=0.1, epochs=25, batch_norm=True, batch_size=50, seed=1, keep="last", objective="val_loss")
    best = train([run.model_copy(update={"keep": "best"})], digits).records[0]
    trained = train([run], digits, keep_final=True)
    record = trained.records[0]
    assert best.best_epoch < 25, "the last epoch is the best: the test shows nothing"
    assert record.history == best.history
    assert record.best_epoch == 25
    assert record.objective == record.val["loss"] == record.history["val_loss"][-1]
    kept = trained.state()["left"][0]
    assert all(torch.equal(kept["best"][name], tensor) for name, tensor in kept["network"].items())


@pytest.mark.parametrize("objective", ["loss", "val_loss"])
def test_the_test_set_influences_nothing_but_the_test_scores(objective, digits):
    specs = stopping(objective=objective)
    noise = torch.randint(256, digits.test_images.shape, generator=generator(0, "x")).to(torch.uint8)
    shuffled = digits.test_labels[torch.randperm(360, generator=generator(1, "x"))]
    spoilt = dataclasses.replace(digits, test_images=noise, test_labels=shuffled)
    for one, other in zip(train(specs, digits).records, train(specs, spoilt).records, strict=True):
        assert other.test["error"] > 0.75
        assert other.test != one.test
        assert facts(dataclasses.replace(other, test=one.test)) == facts(one)


def test_without_a_validation_split_there_are_no_validation_scores(digits):
    trained = train([spec(objective="error", val_frac=0)], digits)
    record = trained.records[0]
    assert trained.examples == 287
    assert record.val is None
    assert set(record.history) == {"loss", "error"}
    assert record.objective == min(record.history["error"])


def test_the_validation_part_is_not_trained_on(digits):
    assert cohort([spec()], digits).examples == 287 - 29
    run = spec(objective="loss", epochs=3)
    chosen = subset(
        digits.train_labels.numpy(),
        examples_frac=0.2,
        val_frac=0.1,
        skew_type="none",
        imbalance_factor=1.0,
        data_seed=0,
    )
    images = digits.train_images.clone()
    images[chosen.val] = 255 - images[chosen.val]
    one, other = (train([run], data).records[0] for data in (digits, dataclasses.replace(digits, train_images=images)))
    assert one.history["loss"] == other.history["loss"]
    assert one.test == other.test
    assert one.history["val_loss"] != other.history["val_loss"]


@pytest.mark.parametrize("algorithm", RULES)
def test_a_last_batch_of_one_with_batch_norm(algorithm, digits):
    run = spec(algorithm, batch_norm=True, batch_size=257, lr=0.01, epochs=10)
    trained = cohort([run], digits)
    assert trained.examples % 257 == 1
    while not trained.done:
        trained.run_epoch()
    record = trained.records[0]
    assert record.status == "complete"
    assert record.history["loss"][-1] < record.history["loss"][0]


def test_training_examples_are_drawn_anew_every_epoch_and_all_of_them(digits, monkeypatch):
    seen = []
    batch = Feed.batch

    def watched(feed, part, rows, draws=None, which=None):
        if draws is not None:
            seen.append(rows.clone())
        return batch(feed, part, rows, draws, which)

    monkeypatch.setattr(Feed, "batch", watched)
    trained = train([spec(seed=0, epochs=2), spec(seed=1, epochs=2)], digits)
    epochs = torch.cat(seen, 1).view(2, 2, trained.examples)
    assert all(torch.equal(run.sort().values, epochs[0, 0].sort().values) for run in epochs.flatten(0, 1))
    assert epochs[0, 0].unique().numel() == trained.examples
    assert len({tuple(run.tolist()) for run in epochs.flatten(0, 1)}) == 4


@pytest.mark.parametrize("skew", ["none", "step"])
def test_unshuffled_examples_come_in_the_order_of_the_data_set(skew, digits, monkeypatch):
    seen = []
    batch = Feed.batch

    def watched(feed, part, rows, draws=None, which=None):
        if draws is not None:
            seen.append(rows.clone())
        return batch(feed, part, rows, draws, which)

    monkeypatch.setattr(Feed, "batch", watched)
    specs = [spec(seed=seed, epochs=2, shuffle=False, skew_type=skew) for seed in (0, 1)]
    trained = train(specs, digits)
    epochs = torch.cat(seen, 1).view(2, 2, trained.examples)
    assert (epochs == epochs[0, 0]).all()
    assert (epochs[0, 0].diff() > 0).all()


@pytest.mark.parametrize("skew", ["long_tailed", "step"])
def test_skewed_training_sees_fewer_examples_and_the_same_validation(skew, digits):
    plain, skewed = spec(lr=1e-9), spec(lr=1e-9, skew_type=skew, imbalance_factor=5)
    one, other = train([plain], digits), train([skewed], digits)
    assert other.examples < 0.8 * one.examples
    assert other.records[0].status == "complete"
    assert other.records[0].history["val_loss"] == pytest.approx(one.records[0].history["val_loss"], rel=1e-5)
    assert other.records[0].history["loss"] != pytest.approx(one.records[0].history["loss"], rel=1e-3)


@pytest.mark.parametrize(
    "change",
    [{"brightness": 0.5}, {"rotation": 30}, {"zoom": 0.3}, {"translation": 0.2}, {"flip": 0.5}, {"crop": 1}],
    ids=str,
)
def test_augmentation_changes_training_images_only(change, digits):
    one, other = (train([spec(lr=1e-9, **own)], digits, dtype=torch.float64).records[0] for own in ({}, change))
    assert other.history["loss"] != pytest.approx(one.history["loss"], rel=1e-3)
    assert other.history["loss"][0] != pytest.approx(other.history["loss"][1], rel=1e-5)
    assert other.history["val_loss"] == pytest.approx(one.history["val_loss"], rel=1e-6)
    assert other.test == pytest.approx(one.test, rel=1e-6)


def test_augmentation_and_skew_are_each_runs_own(digits):
    both = {
        "rotation": 15,
        "translation": 0.1,
        "flip": 0.5,
        "crop": 1,
        "input_dropout": 0.2,
        "skew_type": "step",
        "imbalance_factor": 4,
    }
    specs = [spec("dfa", **both, **changes) for changes in DIFFERENT]
    together = train(specs, digits, dtype=torch.float64)
    for run, own in enumerate(specs):
        alone = train([own], digits, dtype=torch.float64).records[0]
        assert_close_records(together.records[run], alone, loss=1e-8, error=1e-12)


def test_one_augmentation_does_not_change_the_numbers_of_another(digits):
    """That of the digits is what it was before there was any cropping."""

    def images(**changes):
        feed = Feed(digits, spec(**changes), torch.device("cpu"))
        draws = Draws([0, 7], Clock(torch.device("cpu")), torch.float32)
        return feed.batch(feed.train, torch.arange(10).view(2, 5), draws)[0]

    turned = images(rotation=30, brightness=0.2)
    assert torch.equal(images(rotation=30, brightness=0.2, flip=1e-9), turned)
    mirrored = images(flip=1, rotation=0)
    assert torch.equal(mirrored.unflatten(2, (8, 8)).flip(-1).flatten(2), images())
    assert not torch.equal(images(crop=1), images())
    assert turned.double().sum().item() == pytest.approx(-236.530, abs=0.01)


def test_dropout_is_for_training_only(digits):
    one, other = (train([spec(lr=1e-9, dropout=rate)], digits, dtype=torch.float64).records[0] for rate in (0.0, 0.5))
    assert other.history["loss"] != pytest.approx(one.history["loss"], rel=1e-3)
    assert other.history["val_loss"] == pytest.approx(one.history["val_loss"], rel=1e-6)


@pytest.mark.parametrize("objective", ["loss", "error", "val_loss", "val_error"])
def test_dropout_on_inputs_is_for_training_only_whatever_the_objective(objective, digits):
    changes = {"lr": 1e-9, "objective": objective}
    one, other = (
        train([spec(input_dropout=rate, **changes)], digits, dtype=torch.float64).records[0] for rate in (0.0, 0.5)
    )
    assert other.history["loss"] != pytest.approx(one.history["loss"], rel=1e-3)
    assert other.history["val_loss"] == pytest.approx(one.history["val_loss"], rel=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_reconstruction_is_that_of_whole_inputs(dropout, digits, monkeypatch):
    seen = []
    gradients = Backpropagation.gradients

    def watched(rule, step):
        seen.append((step.inputs.clone(), step.target.clone()))
        gradients(rule, step)

    monkeypatch.setattr(Backpropagation, "gradients", watched)
    changes = {"problem_type": "reconstruction", "scaler": "zero_one", "input_dropout": dropout, "epochs": 1}
    seeds = (3, 3, 4)
    train([spec(seed=seed, lr=lr, **changes) for seed, lr in zip(seeds, (0.1, 0.2, 0.1), strict=True)], digits)
    for inputs, target in seen:
        dropped = (inputs == 0) & (target > 0)
        torch.testing.assert_close(inputs[~dropped], target[~dropped] / (1 - dropout))
        share = dropped.sum() / (target > 0).sum()
        assert share.item() == pytest.approx(dropout, abs=0.05 if len(target[0]) == 64 else 0.2)
        assert torch.equal(target[0], target[2]), "the learning rate sorts them, and these have one seed"
        assert torch.equal(dropped[0], dropped[2])
        assert not dropout or not torch.equal(dropped[0], dropped[1])
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("scaler", "low", "high"), [("standard", -1.0, 1.0), ("zero_one", 0.0, 1.0), ("identity", 0.0, 255.0)]
)
def test_the_feed_scales_pixels_and_makes_targets(scaler, low, high, digits):
    feed = Feed(digits, spec(scaler=scaler), torch.device("cpu"))
    rows = feed.train.index[torch.tensor([[3, 5, 8], [1, 3, 2]])]
    inputs, target, labels = feed.batch(feed.train, rows)
    raw = digits.train_images[rows.flatten()].flatten(1).view(2, 3, 64).float()
    torch.testing.assert_close(inputs, low + (high - low) * raw / 255, rtol=1e-6, atol=1e-6)
    assert torch.equal(labels, digits.train_labels[rows])
    assert torch.equal(target.argmax(-1), labels)
    assert torch.equal(target.sum(-1), torch.ones(2, 3))
    reconstructing = Feed(
        digits, spec(scaler=scaler, problem_type="reconstruction"), torch.device("cpu"), torch.float64
    )
    inputs, target, _ = reconstructing.batch(reconstructing.train, rows)
    assert (feed.inputs, feed.targets, reconstructing.targets) == (64, 10, 64)
    assert target.dtype == torch.float64
    assert torch.equal(inputs, target)
    which = torch.tensor([1, 0, 1])
    for own, each in zip(feed.batch(feed.train, rows), feed.batch(feed.train, rows, which=which), strict=True):
        assert torch.equal(own[which], each)


def test_the_feed_subtracts_means_and_divides_by_deviations_of_channels():
    pixels = torch.arange(2 * 3 * 4, dtype=torch.uint8).view(2, 3, 2, 2)
    labels = torch.tensor([0, 1])
    data = cache.Data("mine", pixels, labels, pixels, labels, ["a", "b"])
    run = spec(scaler="10,20,30/2,4,8", examples_frac=1, val_frac=0, objective="loss")
    feed = Feed(data, run, torch.device("cpu"), torch.float64)
    inputs, _, _ = feed.batch(feed.test, torch.tensor([[1, 0]]))
    means, deviations = torch.tensor([10.0, 20, 30]).view(3, 1, 1), torch.tensor([2.0, 4, 8]).view(3, 1, 1)
    torch.testing.assert_close(inputs[0], ((pixels.flip(0) - means) / deviations).flatten(1).double())
    one = Feed(data, run.model_copy(update={"scaler": "10/2"}), torch.device("cpu"), torch.float64)
    torch.testing.assert_close(one.batch(one.test, torch.tensor([[0, 1]]))[0][0], (pixels.flatten(1).double() - 10) / 2)
    with pytest.raises(UsageError, match=r"scaler 1,2/3,4: it is for 2 channels, and these images have 3\."):
        Feed(data, run.model_copy(update={"scaler": "1,2/3,4"}), torch.device("cpu"))


def test_a_seed_gives_the_same_numbers_twice_and_another_gives_others(digits):
    one, same, other = (train([spec("dfa", seed=seed)], digits).records[0] for seed in (0, 0, 1))
    assert facts(one) == facts(same)
    assert one.history["loss"] != other.history["loss"]
    assert one.seconds > 0


# Schedules and clipping


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1, 1, 1, 1, 1, 1]),
        ("linear", [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("linear@3", [1, 1, 1, 1, 2 / 3, 1 / 3]),
        ("linear@9", [1, 1, 1, 1, 1, 1]),
        ("0.1@2-4", [1, 1, 0.1, 0.1, 0.01, 0.01]),
        ("cosine", [1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]),
    ],
)
def test_schedules(schedule, expected):
    assert [schedules.factor(schedule, epoch, 6) for epoch in range(6)] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("schedule", ["0.1@4-2", "0.1@2-2", "2@3", "1@3", "linear@", "step", "", "0.1@", "-0.1@3"])
def test_what_is_no_schedule_is_refused(schedule):
    with pytest.raises(ValueError, match="give constant, cosine, linear, linear@EPOCH, or FACTOR@EPOCH"):
        spec(schedule=schedule)


THEIRS = {
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4),
    "0.1@1-3": lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3], 0.1),
    "linear": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 - epoch / 4),
}


@pytest.mark.parametrize("schedule", THEIRS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_schedule_is_torchs(optimizer, schedule, digits):
    run = spec("bp", optimizer=optimizer, weight_decay=0.01, schedule=schedule)
    plain, ours = Plain(run, digits), cohort([run], digits, dtype=torch.float64)
    scheduler = THEIRS[schedule](plain.optimizer)
    for epoch in range(run.epochs):
        plain.epoch(epoch)
        scheduler.step()
        ours.run_epoch()
    losses = ours.records[0].history["val_loss"]
    assert losses[-1] == pytest.approx(plain.scores(plain.val)[0], rel=1e-8)
    assert losses != cohort_losses(run.model_copy(update={"schedule": "constant"}), digits)


def cohort_losses(run, data):
    return train([run], data, dtype=torch.float64).records[0].history["val_loss"]


@pytest.mark.parametrize("schedule", ["cosine", "0.1@2", "linear@1"])
def test_schedules_go_through_resumes(schedule, digits):
    assert_resumes_everywhere([spec("dfa", schedule=schedule, seed=seed) for seed in (0, 1)], digits)


def test_gradients_are_clipped_for_each_run_by_the_norm_over_all_of_them():
    drawn = [torch.randn(3, 4, 5, generator=generator(1, "x")), torch.randn(3, 1, 5, generator=generator(2, "x"))]
    for tensor in drawn:
        tensor[1] *= 1e-3
    clipped = [tensor.clone() for tensor in drawn]
    optim.clip_(clipped, 0.5)
    for run in range(3):
        theirs = [torch.zeros_like(tensor[run], requires_grad=True) for tensor in drawn]
        for parameter, gradient in zip(theirs, drawn, strict=True):
            parameter.grad = gradient[run].clone()
        torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        for parameter, ours in zip(theirs, clipped, strict=True):
            torch.testing.assert_close(ours[run], parameter.grad, rtol=1e-5, atol=0)
    assert torch.equal(clipped[0][1], drawn[0][1])


def test_clipping_bounds_a_step(digits):
    """SGD without momentum moves by at most rate × limit in a step."""
    run = spec("bp", optimizer="sgd", momentum=0.0, lr=0.1, clip=0.01, batch_size=1000, val_frac=0, objective="loss")
    trained = cohort([run], digits, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in trained._network.parameters.items()}
    trained.run_epoch()
    moved = sum((trained._network.parameters[name] - tensor).square().sum() for name, tensor in before.items())
    assert moved.sqrt().item() == pytest.approx(0.1 * 0.01, rel=1e-9)

"""Trackers against their definitions, and that measuring changes nothing."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from bpf.algorithms import Problem
from bpf.algorithms.dfa import DirectFeedbackAlignment
from bpf.algorithms.drtp import DirectRandomTargetProjection
from bpf.data import cache
from bpf.experiment.plugins import load_rules
from bpf.nn.layer import Structure
from bpf.nn.losses import cross_entropy
from bpf.nn.network import Network
from bpf.spec.run import RunSpec
from bpf.trackers import Probe, Tracker
from bpf.trackers.activity import Activations
from bpf.trackers.alignment import BpCosine, WeightAlignment
from bpf.trackers.base import cosine
from bpf.trackers.local import LocalLoss
from bpf.trackers.norms import Gradients, Weights
from bpf.training.cohort import Cohort

RULES = load_rules(["bp", "dfa", "drtp", "ll-cce", "ll-mse"])
RUNS, BATCH, INPUTS, TARGETS = 3, 20, 6, 4


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return cache.load("digits", tmp_path_factory.mktemp("data"))


def probe(algorithm, widths=(7, 5, 8), batch_norm=False):
    structure = Structure(INPUTS, widths, TARGETS, "tanh", batch_norm, init="torch")
    inits = ["lecun", "ortho", "nokland"] if RULES[algorithm].has_feedback else None
    network = Network.build(structure, range(RUNS), inits, torch.float64)
    drawn = torch.Generator().manual_seed(3)
    for tensor in network.parameters.values():
        tensor += 0.3 * torch.randn(tensor.shape, generator=drawn, dtype=torch.float64)
    inputs = torch.randn(RUNS, BATCH, INPUTS, generator=drawn, dtype=torch.float64)
    labels = torch.randint(TARGETS, (RUNS, BATCH), generator=drawn)
    rule = RULES[algorithm](RULES[algorithm].Options(), Problem("classification", "sigmoid"))
    return Probe(network, rule, cross_entropy, inputs, F.one_hot(labels, TARGETS).double()), inputs, labels


def true_gradients(network, inputs, labels, run):
    """Weight gradients of the cross-entropy by autograd, and those of dfa from its equation."""
    own = {name: t[run].squeeze(0).clone().requires_grad_() for name, t in network.parameters.items()}
    h, before, after = inputs[run], [], []
    for k in range(len(network.hidden)):
        before.append(h)
        a = F.linear(h, own[f"weight.{k}"], own[f"bias.{k}"])
        if f"scale.{k}" in own:
            a = F.batch_norm(a, None, None, own[f"scale.{k}"], own[f"shift.{k}"], training=True)
        h = torch.tanh(a)
        after.append(h)
    k = len(network.hidden)
    logits = F.linear(h, own[f"weight.{k}"], own[f"bias.{k}"])
    weights = [own[f"weight.{k}"] for k in range(len(network.layers))]
    true = torch.autograd.grad(F.cross_entropy(logits, labels[run]), weights, retain_graph=True)
    e = (torch.softmax(logits, -1) - F.one_hot(labels[run], TARGETS)).detach() / BATCH
    dfa = []
    for k, h in enumerate(after):
        error = e @ network.buffers[f"feedback.{k}"][run].T
        dfa.append(torch.autograd.grad(h, weights[k], error, retain_graph=True)[0])
    return true, [*dfa, true[-1]]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_bp_cosine_is_the_cosine_of_the_two_weight_gradients(batch_norm):
    measured, inputs, labels = probe("dfa", batch_norm=batch_norm)
    values = BpCosine().measure(measured)
    assert list(values) == ["layer.0", "layer.1", "layer.2", "layer.3"]
    for run in range(RUNS):
        true, dfa = true_gradients(measured.network, inputs, labels, run)
        for k in range(4):
            expected = F.cosine_similarity(true[k].flatten(), dfa[k].flatten(), dim=0)
            torch.testing.assert_close(values[f"layer.{k}"][run], expected, rtol=1e-9, atol=1e-12)
            assert expected < 0.95 or k == 3


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("algorithm", RULES)
def test_bp_cosine_is_1_for_bp_and_for_output_layers(algorithm, batch_norm):
    values = BpCosine().measure(probe(algorithm, batch_norm=batch_norm)[0])
    ones = torch.ones(RUNS, dtype=torch.float64)
    torch.testing.assert_close(values["layer.3"], ones)
    for k in range(3):
        if algorithm == "bp":
            torch.testing.assert_close(values[f"layer.{k}"], ones)
        else:
            assert (values[f"layer.{k}"].abs() < 0.95).all()


@pytest.mark.parametrize("batch_norm", [False, True])
def test_dfa_with_the_transposed_output_weights_is_bp_in_a_net_of_one_hidden_layer(batch_norm):
    measured, _, _ = probe("dfa", widths=(7,), batch_norm=batch_norm)
    network = measured.network
    assert (BpCosine().measure(measured)["layer.0"] < 0.95).all()
    network.buffers["feedback.0"].copy_(network.parameters["weight.1"].mT)
    again = Probe(network, measured.rule, cross_entropy, measured.inputs, measured.target)
    torch.testing.assert_close(BpCosine().measure(again)["layer.0"], torch.ones(RUNS, dtype=torch.float64))
    network.buffers["feedback.0"].neg_()
    opposite = Probe(network, measured.rule, cross_entropy, measured.inputs, measured.target)
    torch.testing.assert_close(BpCosine().measure(opposite)["layer.0"], -torch.ones(RUNS, dtype=torch.float64))


def test_weight_alignment_is_refinettis():
    measured, _, _ = probe("ll-cce")
    network = measured.network
    values = WeightAlignment().measure(measured)
    assert list(values) == ["layer.1", "layer.2", "layer.3"]
    feedback = [network.buffers[f"feedback.{k}"] for k in range(3)]
    for run in range(RUNS):
        targets = [feedback[1][run] @ feedback[0][run].T, feedback[2][run] @ feedback[1][run].T, feedback[2][run].T]
        for k, target in enumerate(targets, 1):
            weight = network.parameters[f"weight.{k}"][run]
            expected = F.cosine_similarity(weight.flatten(), target.flatten(), dim=0)
            torch.testing.assert_close(values[f"layer.{k}"][run], expected)
            assert expected.abs() < 0.9


def test_weight_alignment_is_1_where_weights_are_initialised_aligned():
    network = Network.build(Structure(6, (5, 7), 3, init="aligned"), [0, 1], ["ortho", "lecun"], torch.float64)
    rule = DirectFeedbackAlignment(DirectFeedbackAlignment.Options(), Problem("classification", "sigmoid"))
    values = WeightAlignment().measure(Probe(network, rule, cross_entropy, torch.empty(0), torch.empty(0)))
    for k in (1, 2):
        torch.testing.assert_close(values[f"layer.{k}"], torch.ones(2, dtype=torch.float64))


def test_weight_alignment_of_a_rule_that_feeds_back_the_target():
    """The target has the opposite sign of the error; between hidden layers the two signs cancel."""
    network = Network.build(Structure(6, (5, 7), 3, init="aligned"), [0], ["ortho"], torch.float64)
    rule = DirectRandomTargetProjection(DirectRandomTargetProjection.Options(), Problem("classification", "sigmoid"))
    values = WeightAlignment().measure(Probe(network, rule, cross_entropy, torch.empty(0), torch.empty(0)))
    torch.testing.assert_close(values["layer.1"], torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(values["layer.2"], -torch.ones(1, dtype=torch.float64))


def test_weight_alignment_is_that_of_the_backward_weights_where_a_rule_has_them():
    class Mine(DirectFeedbackAlignment):
        has_feedback = False

        def backward_weights(self, network, layer):
            return -3 * layer.weight if layer.index == 1 else None

    network = Network.build(Structure(6, (5, 7), 3), [0, 1], None, torch.float64)
    rule = Mine(Mine.Options(), Problem("classification", "sigmoid"))
    values = WeightAlignment().measure(Probe(network, rule, cross_entropy, torch.empty(0), torch.empty(0)))
    assert list(values) == ["layer.1"]
    torch.testing.assert_close(values["layer.1"], -torch.ones(2, dtype=torch.float64))


def test_weight_alignment_needs_feedback():
    assert WeightAlignment().measure(probe("bp")[0]) == {}


def test_gradients_are_euclidean_norms():
    measured, inputs, labels = probe("dfa", batch_norm=True)
    values = Gradients().measure(measured)
    assert sorted(values) == sorted(f"{kind}.{k}" for kind in ("weight", "bias") for k in range(4))
    for run in range(RUNS):
        _, dfa = true_gradients(measured.network, inputs, labels, run)
        for k in range(4):
            torch.testing.assert_close(values[f"weight.{k}"][run], dfa[k].norm())


def test_weights_are_euclidean_norms():
    measured, _, _ = probe("dfa", batch_norm=True)
    values = Weights().measure(measured)
    assert sorted(values) == sorted(f"{kind}.{k}" for kind in ("weight", "bias") for k in range(4))
    for name, value in values.items():
        expected = [tensor.norm() for tensor in measured.network.parameters[name]]
        torch.testing.assert_close(value, torch.stack(expected))


@pytest.mark.parametrize("algorithm", [rule for rule in RULES if rule != "bp"])
def test_the_signal_of_a_rule_is_the_gradient_of_its_local_loss(algorithm):
    """By central differences in random directions, with the output error held."""
    rule = probe(algorithm)[0].rule
    drawn = torch.Generator().manual_seed(1)
    p, e = (torch.randn(RUNS, BATCH, TARGETS, generator=drawn, dtype=torch.float64) for _ in range(2))
    y = F.one_hot(torch.randint(TARGETS, (RUNS, BATCH), generator=drawn), TARGETS).double()
    signal = rule.teaching_signal(p.clone(), y, e)
    for _ in range(5):
        direction = 1e-6 * torch.randn(p.shape, generator=drawn, dtype=torch.float64)
        rise = rule.local_loss(p + direction, y, e) - rule.local_loss(p - direction, y, e)
        torch.testing.assert_close(rise, 2 * (signal * direction).sum((1, 2)), rtol=1e-5, atol=1e-13)


@pytest.mark.parametrize("algorithm", RULES)
def test_local_losses_are_those_of_the_definition(algorithm):
    measured, inputs, labels = probe(algorithm)
    values = LocalLoss().measure(measured)
    network = measured.network
    for run in range(RUNS):
        h, outputs = inputs[run], []
        for k in range(4):
            h = F.linear(h, network.parameters[f"weight.{k}"][run], network.parameters[f"bias.{k}"][run].squeeze(0))
            h = torch.tanh(h) if k < 3 else h
            outputs.append(h)
        torch.testing.assert_close(values["layer.3"][run], F.cross_entropy(h, labels[run]))
        y = F.one_hot(labels[run], TARGETS).double()
        e = (h.softmax(-1) - y) / BATCH
        for k in range(3 if algorithm != "bp" else 0):
            p = outputs[k] @ network.buffers[f"feedback.{k}"][run]
            expected = {
                "dfa": (p * e).sum(),
                "drtp": (p * y).sum() / BATCH,
                "ll-cce": F.cross_entropy(p, labels[run]),
                "ll-mse": F.mse_loss(p.sigmoid(), y),
            }[algorithm]
            torch.testing.assert_close(values[f"layer.{k}"][run], expected)
    assert len(values) == (1 if algorithm == "bp" else 4)


@pytest.mark.parametrize("activation", ["tanh", "relu", "swish", "lrelu", "sigmoid", "gelu", "elu"])
def test_activations_are_described(activation):
    structure = Structure(INPUTS, (7, 5), TARGETS, activation, init="torch")
    network = Network.build(structure, range(RUNS), None, torch.float64)
    network.parameters["weight.0"][1, 3] = 0  # a dead unit: its output does not depend on the input
    network.parameters["weight.0"][2] *= 30
    inputs = torch.randn(RUNS, BATCH, INPUTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rule = RULES["bp"](RULES["bp"].Options(), Problem("classification", "sigmoid"))
    values = Activations().measure(Probe(network, rule, cross_entropy, inputs, torch.empty(0)))
    others = {"tanh": torch.tanh, "swish": F.silu, "sigmoid": torch.sigmoid, "lrelu": F.leaky_relu}
    function = others.get(activation) or getattr(F, activation)
    for run in range(RUNS):
        a = F.linear(inputs[run], network.parameters["weight.0"][run], network.parameters["bias.0"][run].squeeze(0))
        a.requires_grad_()
        h = function(a)
        slope = torch.autograd.grad(h.sum(), a)[0].abs()
        told = {name.removeprefix("layer.0."): value[run].item() for name, value in values.items() if "layer.0" in name}
        h = h.detach()
        assert told["mean"] == pytest.approx(h.mean().item())
        assert told["std"] == pytest.approx(h.std().item())
        dead = sum(len(set(unit.tolist())) == 1 for unit in h.T) / 7
        assert told["dead"] == pytest.approx(dead)
        assert told["saturated"] == pytest.approx((slope < 0.05 * slope.max()).double().mean().item())
        ordered = sorted(h.flatten().tolist())
        deciles = [ordered[round(i * (len(ordered) - 1) / 10)] for i in range(11)]
        assert [told[f"q{10 * i:02d}"] for i in range(11)] == pytest.approx(deciles)
    assert values["layer.0.dead"][1] >= 1 / 7
    if activation in ("tanh", "sigmoid"):
        assert values["layer.0.saturated"][2] > values["layer.0.saturated"][0] + 0.3


def test_cosine_of_nothing_is_0():
    zero, one = torch.zeros(2, 3, 3), torch.ones(2, 3, 3)
    assert cosine(zero, one).tolist() == [0, 0]
    assert cosine(one, -2 * one).tolist() == pytest.approx([-1, -1])


# In training


def specs(algorithm, **changes):
    small = {"dataset": "digits", "algorithm": algorithm, "arch": "24-16", "epochs": 3, "examples_frac": 0.2}
    small |= {"objective": "val_loss", "early_stopping": 1}
    different = [{"lr": 0.01, "seed": 0}, {"lr": 0.1, "seed": 1, "dropout": 0.3}, {"lr": 0.001, "seed": 2}]
    return [RunSpec.model_validate(small | changes | own) for own in different]


def train(runs, data, **options):
    cohort = Cohort(runs, RULES[runs[0].algorithm], data, **options)
    while not cohort.done:
        cohort.run_epoch()
    return cohort.records


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("algorithm", RULES)
def test_measuring_changes_nothing(algorithm, batch_norm, layerwise, digits):
    trackers = {
        "bp_cosine": BpCosine(),
        "weight_alignment": WeightAlignment(),
        "gradients": Gradients(),
        "weights": Weights(),
        "local_loss": LocalLoss(),
        "activations": Activations(),
    }
    runs = specs(algorithm, batch_norm=batch_norm)
    without = train(runs, digits, layerwise=layerwise)
    measured = train(runs, digits, trackers=trackers, layerwise=layerwise)
    for one, other in zip(without, measured, strict=True):
        untimed = [dataclasses.replace(r, tracked={}, seconds=0.0, tracking_seconds=0.0) for r in (one, other)]
        assert untimed[0] == untimed[1]
        assert (one.tracked, one.tracking_seconds) == ({}, 0.0)
        assert 0 < other.tracking_seconds < other.seconds
        assert other.tracked["epoch"] == list(range(other.epochs + 1)), "before training and after each epoch"
        tracked = {name: values for name, values in other.tracked.items() if "/" in name}
        layers = 0 if algorithm == "bp" else 2
        assert len(tracked) == 3 + layers + 6 + 6 + (1 + layers) + 2 * 15
        assert {len(values) for values in tracked.values()} == {other.epochs + 1}
        assert tracked["bp_cosine/layer.2"] == pytest.approx([1] * (other.epochs + 1), abs=1e-5)


@pytest.mark.parametrize(
    ("every", "steps"),
    [("1", [0, 5, 10, 15]), ("2", [0, 10]), ("4 steps", [0, 4, 8, 12]), ("10 steps", [0, 10]), ("99", [0])],
)
def test_how_often_to_measure(every, steps, digits):
    runs = [run.model_copy(update={"early_stopping": 0, "tracker_every": every}) for run in specs("dfa")]
    for record in train(runs, digits, trackers={"weights": Weights()}):
        assert record.tracked["step"] == steps
        assert record.tracked["epoch"] == [step / 5 for step in steps]
        assert len(record.tracked["weights/weight.0"]) == len(steps)


def test_an_interval_is_epochs_or_steps():
    told = {text: RunSpec.model_validate({"dataset": "d", "algorithm": "bp", "tracker_every": text}).tracking
            for text in ("5", 5, "5 epochs", "100 steps", "100steps", "1 step")}  # fmt: skip
    assert told == {
        "5": ("epochs", 5), 5: ("epochs", 5), "5 epochs": ("epochs", 5),
        "100 steps": ("steps", 100), "100steps": ("steps", 100), "1 step": ("steps", 1),
    }  # fmt: skip


def test_values_belong_to_their_runs(digits):
    class Own(Tracker):
        """How far the output biases went from zero, to tell learning rates by, and where the run is stacked."""

        def measure(self, probe):
            return {"bias": probe.network.output.bias.flatten(1).norm(dim=1), "position": torch.arange(3.0)}

    runs = [run.model_copy(update={"early_stopping": 0}) for run in specs("bp")]
    records = train(runs, digits, trackers={"own": Own()})
    sizes = [record.tracked["own/bias"][1] for record in records]
    assert sizes[2] < 0.5 * sizes[0] < 0.5 * sizes[1]
    assert [record.tracked["own/position"] for record in records] == [[1.0] * 4, [2.0] * 4, [0.0] * 4]


@pytest.mark.parametrize("rule", ["dfa", "drtp"])
def test_weights_align_with_feedback(rule, digits):
    """Refinetti et al. 2021: weights align first. At initialisation they are at right angles."""
    runs = specs(rule, arch="100-50", epochs=10, examples_frac=1.0, early_stopping=0)[::2]
    for record in train(runs, digits, trackers={"weight_alignment": WeightAlignment(), "bp_cosine": BpCosine()}):
        for k in (1, 2):
            alignment = record.tracked[f"weight_alignment/layer.{k}"]
            assert alignment[-1] > alignment[0] + 0.03
        assert record.tracked["weight_alignment/layer.2"][-1] > (0.3 if rule == "dfa" else 0.1)
        towards_bp = record.tracked["bp_cosine/layer.1"]
        assert towards_bp[-1] > towards_bp[0] + (0.2 if rule == "dfa" else 0.05)

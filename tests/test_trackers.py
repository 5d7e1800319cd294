"""Trackers against their definitions, and that measuring changes nothing."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from bpf.algorithms import Problem
from bpf.algorithms.dfa import DirectFeedbackAlignment
from bpf.data import cache
from bpf.experiment import load_rules
from bpf.losses import cross_entropy
from bpf.network import Network, Structure
from bpf.spec import RunSpec
from bpf.trackers import Probe, Tracker
from bpf.trackers.alignment import BpCosine, WeightAlignment
from bpf.trackers.base import cosine
from bpf.trackers.norms import Gradients
from bpf.training import Cohort

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
    trackers = {"bp_cosine": BpCosine(), "weight_alignment": WeightAlignment(), "gradients": Gradients()}
    runs = specs(algorithm, batch_norm=batch_norm)
    without = train(runs, digits, layerwise=layerwise)
    measured = train(runs, digits, trackers=trackers, layerwise=layerwise)
    for one, other in zip(without, measured, strict=True):
        tracked = {name: values for name, values in other.history.items() if "/" in name}
        rest = {name: values for name, values in other.history.items() if "/" not in name}
        assert dataclasses.replace(other, history=rest, seconds=0.0) == dataclasses.replace(one, seconds=0.0)
        assert len(tracked) == 3 + 6 + (0 if algorithm == "bp" else 2)
        assert {len(values) for values in tracked.values()} == {other.epochs}
        assert tracked["bp_cosine/layer.2"] == pytest.approx([1] * other.epochs, abs=1e-5)


def test_values_belong_to_their_runs(digits):
    class Own(Tracker):
        """How far the output biases went from zero, to tell learning rates by, and where the run is stacked."""

        def measure(self, probe):
            return {"bias": probe.network.output.bias.flatten(1).norm(dim=1), "position": torch.arange(3.0)}

    runs = [run.model_copy(update={"early_stopping": 0}) for run in specs("bp")]
    records = train(runs, digits, trackers={"own": Own()})
    sizes = [record.history["own/bias"][0] for record in records]
    assert sizes[2] < 0.5 * sizes[0] < 0.5 * sizes[1]
    assert [record.history["own/position"] for record in records] == [[1.0] * 3, [2.0] * 3, [0.0] * 3]


def test_dfa_aligns_weights_with_feedback(digits):
    """Refinetti et al. 2021: weights align first. At initialisation they are at right angles."""
    runs = specs("dfa", arch="100-50", epochs=10, examples_frac=1.0, early_stopping=0)[::2]
    for record in train(runs, digits, trackers={"weight_alignment": WeightAlignment(), "bp_cosine": BpCosine()}):
        for k in (1, 2):
            alignment = record.history[f"weight_alignment/layer.{k}"]
            assert alignment[-1] > alignment[0] + 0.03
        assert record.history["weight_alignment/layer.2"][-1] > 0.3
        towards_bp = record.history["bp_cosine/layer.1"]
        assert towards_bp[-1] > towards_bp[0] + 0.2

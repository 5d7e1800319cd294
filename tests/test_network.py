"""The stacked network: initialisers, randomness by key, batch norm's statistics, and selecting runs."""

import math

import pytest
import torch
import torch.nn.functional as F

from bpf.algorithms import Problem, Step
from bpf.algorithms.local_loss import LocalCrossEntropy
from bpf.nn.initialisers import FEEDBACK, forward_bias, forward_weight, random_feedback
from bpf.nn.layer import Structure
from bpf.nn.losses import cross_entropy
from bpf.nn.network import Network
from bpf.nn.randomness import Clock, Draws, Dropout, generator, orders
from bpf.spec.fields import choices

CPU = torch.device("cpu")
UNITS, TARGETS = 900, 100
UNIFORM_FEEDBACK = {"frenkel": math.sqrt(6 / UNITS), "nokland": 1 / math.sqrt(UNITS)}
NORMAL_FEEDBACK = {"lecun": 1 / math.sqrt(UNITS), "principled": 1 / math.sqrt(UNITS * TARGETS)}


def drawn(name, seed=0, units=UNITS, targets=TARGETS):
    return random_feedback([(seed, name)], "feedback.0", units, targets, torch.float64)[0]


def assert_uniform(values, bound):
    assert values.abs().max() <= bound
    assert values.max() > 0.99 * bound
    assert values.min() < -0.99 * bound
    assert values.mean().abs() < 0.02 * bound
    assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def assert_normal(values, deviation):
    assert values.mean().abs() < 0.02 * deviation
    assert values.std().item() == pytest.approx(deviation, rel=0.02)
    for sigmas, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        assert (values.abs() < sigmas * deviation).double().mean().item() == pytest.approx(share, abs=0.01)
    assert values.abs().max() > 3.5 * deviation


@pytest.mark.parametrize(("name", "bound"), UNIFORM_FEEDBACK.items())
def test_uniform_feedback(name, bound):
    assert_uniform(drawn(name), bound)


@pytest.mark.parametrize(("name", "deviation"), NORMAL_FEEDBACK.items())
def test_normal_feedback(name, deviation):
    assert_normal(drawn(name), deviation)


def test_every_feedback_initialiser_is_tested():
    assert set(FEEDBACK) == {"ortho", *UNIFORM_FEEDBACK, *NORMAL_FEEDBACK}


@pytest.mark.parametrize(("rows", "columns"), [(60, 10), (10, 60), (8, 8)])
@pytest.mark.parametrize("what", ["feedback", "forward"])
def test_orthogonal_matrices_have_gain_1(what, rows, columns):
    if what == "feedback":
        matrix = drawn("ortho", units=rows, targets=columns)
    else:
        matrix = forward_weight("orthogonal", rows, columns, generator(0, "x"), torch.float64)
    assert matrix.shape == (rows, columns)
    gram = matrix.T @ matrix if rows >= columns else matrix @ matrix.T
    torch.testing.assert_close(gram, torch.eye(min(rows, columns), dtype=torch.float64))


def test_torchs_forward_initialisation_is_that_of_a_linear_layer():
    bound = 1 / math.sqrt(400)
    weight = forward_weight("torch", 100, 400, generator(0, "x"), torch.float64)
    bias = forward_bias("torch", 20_000, 400, generator(0, "x"), torch.float64)
    assert weight.shape == (100, 400)
    assert bias.shape == (1, 20_000)
    assert_uniform(weight, bound)
    assert_uniform(bias, bound)
    linear = torch.nn.Linear(400, 100)
    assert linear.weight.std().item() == pytest.approx(weight.std().item(), rel=0.02)


@pytest.mark.parametrize(
    ("init", "bound"), [("he_uniform", math.sqrt(6 / 400)), ("xavier", math.sqrt(6 / (100 + 400)))]
)
def test_uniform_forward_initialisations(init, bound):
    weight = forward_weight(init, 100, 400, generator(0, "x"), torch.float64)
    assert weight.shape == (100, 400)
    assert_uniform(weight, bound)


def test_akrouts_forward_initialisation_is_normal_for_weights_and_biases():
    weight = forward_weight("akrout", 100, 400, generator(0, "x"), torch.float64)
    bias = forward_bias("akrout", 20_000, 30_000, generator(0, "x"), torch.float64)
    assert (weight.shape, bias.shape) == ((100, 400), (1, 20_000))
    assert_normal(weight, 1 / math.sqrt(100 + 400))
    assert_normal(bias, 1 / math.sqrt(20_000 + 30_000))
    network = Network.build(Structure(6, (5, 4), 3, init="akrout"), [0, 1, 0], None)
    for k in range(3):
        first, other, again = network.parameters[f"bias.{k}"]
        assert torch.equal(first, again)
        assert (first != other).all()
        assert not torch.equal(first[0, :3], network.parameters[f"weight.{k}"][0, 0, :3])


@pytest.mark.parametrize("init", ["orthogonal", "zeros", "aligned", "he_uniform", "xavier"])
def test_biases_begin_at_zero_with_other_initialisations(init):
    network = Network.build(Structure(6, (5, 4), 3, init=init), [0], ["ortho"])
    assert not any(network.parameters[f"bias.{k}"].any() for k in range(3))
    assert network.parameters["weight.0"].any() == (init != "zeros")
    assert network.parameters["weight.2"].any() == (init != "zeros")


def test_no_bias_and_no_feedback_where_none_is_asked_for():
    network = Network.build(Structure(6, (5, 4), 3, use_bias=False), [0, 1], None)
    assert sorted(network.parameters) == ["weight.0", "weight.1", "weight.2"]
    assert network.buffers == {}


def test_aligned_weights_are_products_of_feedback_matrices():
    network = Network.build(Structure(6, (5, 7, 4), 3, init="aligned"), [0, 9], ["lecun", "ortho"], torch.float64)
    feedback = [network.buffers[f"feedback.{k}"] for k in range(3)]
    for run in range(2):
        for k in (1, 2):
            expected = feedback[k][run] @ feedback[k - 1][run].T
            torch.testing.assert_close(network.parameters[f"weight.{k}"][run], expected)
        torch.testing.assert_close(network.parameters["weight.3"][run], feedback[2][run].T)
        first = network.parameters["weight.0"][run]
        torch.testing.assert_close(first @ first.T, torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("init", choices("init"))
@pytest.mark.parametrize("feedback", FEEDBACK)
def test_draws_depend_on_seed_and_purpose_and_not_on_stacking(init, feedback):
    structure = Structure(6, (5, 5, 5), 5, batch_norm=True, init=init)
    stacked = Network.build(structure, [4, 7, 4, 8], [feedback, feedback, "nokland", "lecun"])
    alone = Network.build(structure, [7], [feedback])
    for name, tensor in (alone.parameters | alone.buffers).items():
        everyone = (stacked.parameters | stacked.buffers)[name]
        assert torch.equal(everyone[1:2], tensor), name
        random = name.startswith("feedback") or (init != "zeros" and name.startswith("weight"))
        if random:
            assert not torch.equal(everyone[0], everyone[1]), f"two seeds, one {name}"
    different = [stacked.buffers[f"feedback.{k}"][0] for k in range(3)]
    assert not any(torch.equal(different[i], different[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    if init not in ("zeros", "aligned"):
        assert torch.equal(stacked.parameters["weight.1"][0], stacked.parameters["weight.1"][2])
        assert not torch.equal(stacked.parameters["weight.1"][0], stacked.parameters["weight.2"][0])
        assert not torch.equal(stacked.parameters["weight.1"][0], different[1])


def test_generators_are_keyed_by_seed_purpose_and_epoch_and_leave_the_global_one_alone():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    keys = [(0, "order", 0), (1, "order", 0), (0, "dropout", 0), (0, "order", 1), (1, "order", 10), (11, "order", 0)]
    first = [torch.rand(4, generator=generator(*key)).tolist() for key in keys]
    again = [torch.rand(4, generator=generator(*key)).tolist() for key in keys]
    assert first == again
    assert len({tuple(numbers) for numbers in first}) == len(keys)
    Network.build(Structure(6, (5,), 3), [0], ["ortho"])
    orders([0], 10, 0)
    dropout([0.5], [0], 0).mask(0, 3, 4)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_orders_are_permutations_keyed_by_seed_and_epoch():
    order = orders([3, 5], 50, epoch=2)
    assert order.dtype == torch.int64
    assert order.sort(1).values.tolist() == [list(range(50))] * 2
    assert not torch.equal(order[0], order[1])
    assert torch.equal(orders([5], 50, epoch=2)[0], order[1])
    assert not torch.equal(orders([5], 50, epoch=3)[0], order[1])
    assert order[0].tolist() != list(range(50))


def dropout(rates, seeds, epoch, dtype=torch.float32, clock=None):
    clock = clock or Clock(CPU)
    clock.begin(epoch)
    return Dropout(rates, Draws(seeds, clock, dtype), CPU, dtype)


def test_dropout_has_each_runs_rate_and_keeps_the_mean():
    mask = dropout([0.1, 0.0, 0.75], [0, 1, 2], 0, torch.float64).mask(0, 200, 300)
    for run, rate in enumerate([0.1, 0.0, 0.75]):
        dropped = mask[run] == 0
        assert dropped.double().mean().item() == pytest.approx(rate, abs=0.01)
        torch.testing.assert_close(mask[run][~dropped], torch.full_like(mask[run][~dropped], 1 / (1 - rate)))
    assert torch.equal(mask[1], torch.ones(200, 300, dtype=torch.float64))
    assert mask.mean((1, 2)).tolist() == pytest.approx([1, 1, 1], abs=0.02)


def test_dropout_is_keyed_by_run_and_epoch_and_moves_on_within_an_epoch():
    def masks(rates, seeds, epoch):
        clock = Clock(CPU)
        source = dropout(rates, seeds, epoch, clock=clock)
        first = source.mask(0, 9, 30)
        clock.tick()
        return [first, source.mask(0, 9, 30)]

    together = masks([0.5, 0.3, 0.0], [1, 2, 3], 4)
    alone = masks([0.3], [2], 4)
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one[1], other[0])
    assert not torch.equal(alone[0], alone[1])
    assert not torch.equal(alone[0], masks([0.3], [2], 5)[0])
    assert not torch.equal(alone[0], masks([0.3], [9], 4)[0])
    assert masks([0.0, 0.0], [1, 2], 0) == [None, None]


def test_masked_outputs_are_passed_on_and_the_unmasked_ones_kept():
    network = Network.build(Structure(6, (5,), 3), [0], ["ortho"])
    inputs = torch.rand(1, 4, 6, generator=generator(0, "x"))
    mask = torch.tensor([0.0, 2.0, 0.0, 2.0, 2.0]).expand(1, 4, 5)
    trace = network.layers[0].forward(inputs, mask)
    assert torch.equal(trace.output, network.layers[0].forward(inputs).output)
    assert torch.equal(trace.passed_on, trace.output * mask)


def batch_norm_network(runs=2):
    network = Network.build(Structure(6, (5, 4), 3, "tanh", batch_norm=True), list(range(runs)), ["ortho"] * runs)
    for name, tensor in network.parameters.items():
        tensor += 0.2 * torch.randn(tensor.shape, generator=generator(0, name))
    return network


@pytest.mark.parametrize("batch", [2, 7])
def test_running_statistics_are_those_of_torchs_batch_norm(batch):
    network = batch_norm_network()
    plain = [[torch.nn.BatchNorm1d(units) for units in (5, 4)] for _ in range(2)]
    for number in range(3):
        inputs = torch.randn(2, batch, 6, generator=generator(number, "x"))
        h = inputs
        for layer in network.layers:
            h = layer.forward(h).passed_on
        for run in range(2):
            x = inputs[run]
            for k in range(2):
                x = F.linear(x, network.parameters[f"weight.{k}"][run], network.parameters[f"bias.{k}"][run, 0])
                x = F.batch_norm(
                    x,
                    plain[run][k].running_mean,
                    plain[run][k].running_var,
                    network.parameters[f"scale.{k}"][run, 0],
                    network.parameters[f"shift.{k}"][run, 0],
                    training=True,
                ).tanh()
    held_out = torch.randn(2, 9, 6, generator=generator(9, "x"))
    before = {name: tensor.clone() for name, tensor in network.buffers.items()}
    logits = network.logits(held_out)
    assert all(torch.equal(network.buffers[name], tensor) for name, tensor in before.items())
    for run in range(2):
        x = held_out[run]
        for k in range(2):
            torch.testing.assert_close(network.buffers[f"mean.{k}"][run, 0], plain[run][k].running_mean)
            torch.testing.assert_close(network.buffers[f"variance.{k}"][run, 0], plain[run][k].running_var)
            x = F.linear(x, network.parameters[f"weight.{k}"][run], network.parameters[f"bias.{k}"][run, 0])
            x = F.batch_norm(
                x,
                plain[run][k].running_mean,
                plain[run][k].running_var,
                network.parameters[f"scale.{k}"][run, 0],
                network.parameters[f"shift.{k}"][run, 0],
            ).tanh()
        x = F.linear(x, network.parameters["weight.2"][run], network.parameters["bias.2"][run, 0])
        torch.testing.assert_close(logits[run], x)


def test_batch_norm_takes_a_batch_of_one():
    network = batch_norm_network(runs=1)
    rule = LocalCrossEntropy(LocalCrossEntropy.Options(), Problem("classification", "sigmoid"))
    step = Step(network, torch.rand(1, 1, 6), torch.eye(3)[None, :1], cross_entropy)
    rule.gradients(step)
    assert all(gradient.isfinite().all() for gradient in network.gradients.values())
    assert not network.gradients["weight.0"].any()  # the mean takes the only example off
    assert network.gradients["shift.0"].any()
    assert torch.allclose(network.buffers["variance.0"], torch.tensor(0.9))


def test_biases_under_batch_norm_have_no_gradient_at_all():
    """The sum that would be zero is rounding noise, which Adam with weight decay makes as large as its steps."""
    network = batch_norm_network()
    rule = LocalCrossEntropy(LocalCrossEntropy.Options(), Problem("classification", "sigmoid"))
    rule.gradients(Step(network, torch.rand(2, 5, 6), torch.eye(3)[torch.randint(3, (2, 5))], cross_entropy))
    assert [network.gradients[f"bias.{k}"].any().item() for k in range(3)] == [False, False, True]


def test_selected_runs_have_tensors_of_their_own():
    network = batch_norm_network(runs=3)
    chosen = network.select(torch.tensor([2, 0]))
    assert chosen.runs == 2
    for name, tensor in (network.parameters | network.buffers).items():
        mine = (chosen.parameters | chosen.buffers)[name]
        assert torch.equal(mine, tensor[[2, 0]])
        mine.zero_()
        assert tensor.any() or name.startswith("mean")
    inputs = torch.rand(3, 4, 6)
    torch.testing.assert_close(network.select(torch.tensor([1])).logits(inputs[1:2]), network.logits(inputs)[1:2])


def test_a_shadow_shares_parameters_and_nothing_that_changes():
    network = batch_norm_network()
    shadow = network.shadow()
    for gradient in network.gradients.values():
        gradient.fill_(7)
    before = {name: tensor.clone() for name, tensor in network.buffers.items()}
    rule = LocalCrossEntropy(LocalCrossEntropy.Options(), Problem("classification", "sigmoid"))
    rule.gradients(Step(shadow, torch.rand(2, 5, 6), torch.eye(3)[torch.randint(3, (2, 5))], cross_entropy))
    assert all((gradient == 7).all() for gradient in network.gradients.values())
    assert all(torch.equal(network.buffers[name], tensor) for name, tensor in before.items())
    assert not torch.equal(shadow.buffers["mean.0"], network.buffers["mean.0"])
    assert all(shadow.parameters[name] is tensor for name, tensor in network.parameters.items())


def test_shared_gradients_take_the_memory_of_the_largest_layer():
    structure = Structure(6, (5, 4), 3, batch_norm=True)
    own, shared = (Network.build(structure, [0, 1], ["ortho"] * 2, shared_gradients=s) for s in (False, True))

    def memory(network):
        return sum({g.untyped_storage().data_ptr(): g.untyped_storage().nbytes() for g in gradients(network)}.values())

    def gradients(network):
        return network.gradients.values()

    assert memory(own) == 4 * 2 * (6 * 5 + 5 * 4 + 4 * 3 + 5 + 4 + 3 + 2 * (5 + 4))
    assert memory(shared) == 4 * 2 * (6 * 5 + 5 + 2 * 5)
    assert [g.shape for g in gradients(own)] == [g.shape for g in gradients(shared)]

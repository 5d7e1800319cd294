"""Every rule's gradients against autograd on an independent network, written here from the papers' equations."""

import math
import weakref

import pytest
import torch
import torch.nn.functional as F

from bpf.algorithms import Problem, Step
from bpf.experiment.plugins import load_rules
from bpf.nn.layer import Layer, Structure
from bpf.nn.losses import output_loss, squash_for
from bpf.nn.network import Network
from bpf.nn.randomness import Clock, Draws, Dropout

RUNS, BATCH, INPUTS, CLASSES, WIDTHS = 3, 11, 6, 4, (7, 5, 8)
RULES = load_rules(["bp", "dfa", "drtp", "ll-cce", "ll-mse"])
LOCAL = ("drtp", "ll-cce", "ll-mse")
ACTIVATIONS = {
    "tanh": lambda a: (torch.exp(a) - torch.exp(-a)) / (torch.exp(a) + torch.exp(-a)),
    "sigmoid": lambda a: 1 / (1 + torch.exp(-a)),
    "relu": lambda a: torch.where(a > 0, a, 0 * a),
    "lrelu": lambda a: torch.where(a > 0, a, 0.01 * a),
    "swish": lambda a: a / (1 + torch.exp(-a)),
    "gelu": lambda a: a * (1 + torch.erf(a / math.sqrt(2))) / 2,
    "elu": lambda a: torch.where(a > 0, a, torch.exp(a) - 1),
}
SQUASHES = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "identity": lambda a: a}
# Problem type, output loss, and the squashing function of the squared errors.
CLASSIFICATION = [
    ("classification", "ce", "sigmoid"),
    ("classification", "bce", "sigmoid"),
    ("classification", "mse", "sigmoid"),
    ("classification", "mse", "tanh"),
    ("classification", "mse", "identity"),
]
RECONSTRUCTION = [
    ("reconstruction", "bce", "sigmoid"),
    ("reconstruction", "mse", "sigmoid"),
    ("reconstruction", "mse", "tanh"),
    ("reconstruction", "mse", "identity"),
]
TASKS = CLASSIFICATION + RECONSTRUCTION

every_network = pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
for name, values in {
    "use_bias": [True, False],
    "batch_norm": [False, True],
    "activation": list(ACTIVATIONS),
}.items():
    marked = pytest.mark.parametrize(name, values, ids=[f"{name}={v}" for v in values])
    every_network = (lambda inner, outer: lambda test: outer(inner(test)))(every_network, marked)


class Case:
    """Three stacked runs with nothing at its default value: biases, batch norm's scale and shift are random too."""

    def __init__(self, rule, activation, batch_norm, use_bias, dropout, task):
        self.problem_type, self.loss_name, self.squash = task
        drawn = torch.Generator().manual_seed(5)
        targets = CLASSES if self.problem_type == "classification" else INPUTS
        structure = Structure(INPUTS, WIDTHS, targets, activation, batch_norm, use_bias, "torch")
        has_feedback = RULES[rule].has_feedback
        inits = ["lecun", "ortho", "nokland"] if has_feedback else None
        self.network = Network.build(structure, [3, 1, 4], inits, torch.float64)
        for tensor in self.network.parameters.values():
            tensor += 0.3 * torch.randn(tensor.shape, generator=drawn, dtype=torch.float64)
        uniform = torch.rand(RUNS, BATCH, INPUTS, generator=drawn, dtype=torch.float64)
        low, high = {"tanh": (-1, 1), "sigmoid": (0, 1), "identity": (-2, 3)}[self.squash]
        self.inputs = low + (high - low) * uniform
        labels = torch.randint(CLASSES, (RUNS, BATCH), generator=drawn)
        one_hot = F.one_hot(labels, CLASSES).double()
        self.target = one_hot if self.problem_type == "classification" else self.inputs.clone()
        self.rule = RULES[rule](RULES[rule].Options(), Problem(self.problem_type, self.squash))
        self.rates = [0.4, 0.0, 0.2] if dropout else [0.0] * RUNS
        self.masks = []

    def step(self, repeats=1):
        """The stacked program's gradients, by parameter name, and the step."""
        cpu = torch.device("cpu")
        source = Dropout(self.rates, Draws([3, 1, 4], Clock(cpu), torch.float64), cpu, torch.float64)
        self.masks = []

        def draw(layer, batch, units):
            self.masks.append(source.mask(layer, batch, units))
            return self.masks[-1]

        inputs, target = self.inputs.repeat(1, repeats, 1), self.target.repeat(1, repeats, 1)
        for gradient in self.network.gradients.values():
            gradient.fill_(float("nan"))
        step = Step(self.network, inputs, target, output_loss(self.loss_name, self.squash), draw)
        with torch.no_grad():
            self.rule.gradients(step)
        return {name: gradient.clone() for name, gradient in self.network.gradients.items()}, step


class Reference:
    """One run of a case as a plain network with autograd, after `case.step()` has fixed the dropout masks."""

    def __init__(self, case, run):
        self.case, self.run = case, run
        self.parameters = {
            name: tensor[run].squeeze(0).clone().requires_grad_() for name, tensor in case.network.parameters.items()
        }
        self.feedback = [case.network.buffers.get(f"feedback.{k}") for k in range(len(WIDTHS))]
        self.x, self.y = case.inputs[run], case.target[run]

    def hidden(self, k, x):
        own = self.parameters
        a = F.linear(x, own[f"weight.{k}"], own.get(f"bias.{k}"))
        if f"scale.{k}" in own:
            a = F.batch_norm(a, None, None, own[f"scale.{k}"], own[f"shift.{k}"], training=True, eps=1e-5)
        return ACTIVATIONS[self.case.network.structure.activation](a)

    def dropped(self, k, h):
        mask = self.case.masks[k]
        return h if mask is None else h * mask[self.run]

    def logits(self, h):
        return F.linear(h, self.parameters[f"weight.{len(WIDTHS)}"], self.parameters.get(f"bias.{len(WIDTHS)}"))

    def output_loss(self, logits):
        if self.case.loss_name == "ce":
            return F.cross_entropy(logits, self.y.argmax(-1))
        if self.case.loss_name == "bce":
            return F.binary_cross_entropy(torch.sigmoid(logits), self.y)
        return F.mse_loss(SQUASHES[self.case.squash](logits), self.y)

    def gradients(self):
        return {name: tensor.grad for name, tensor in self.parameters.items()}

    def end_to_end(self):
        """True gradients of the output loss."""
        h = self.x
        for k in range(len(WIDTHS)):
            h = self.dropped(k, self.hidden(k, h))
        loss = self.output_loss(self.logits(h))
        loss.backward()
        return self.gradients(), loss

    def blockwise(self, local_loss):
        """Each hidden layer by autograd of `local_loss(p, y, e)` inside its own block, the output by its own loss."""
        inputs, outputs = self.x, []
        for k in range(len(WIDTHS)):
            outputs.append(self.hidden(k, inputs.detach()))
            inputs = self.dropped(k, outputs[-1])
        logits = self.logits(inputs.detach())
        logits.retain_grad()
        self.output_loss(logits).backward()
        e = logits.grad.clone()
        for k, h in enumerate(outputs):
            local_loss(h @ self.feedback[k][self.run], self.y, e).backward()
        return self.gradients()


def local_loss(rule, squash):
    """DESIGN's table: the loss on the projected output of a layer, for a batch."""
    return {
        "dfa": lambda p, y, e: (p * e).sum(),
        "drtp": lambda p, y, e: (p * y).sum() / len(y),
        "ll-cce": lambda p, y, e: F.cross_entropy(p, y.argmax(-1)),
        "ll-mse": lambda p, y, e: ((SQUASHES[squash](p) - y) ** 2).mean(),
    }[rule]


def cancelled(case, name):
    """Batch norm takes off whatever bias came before it."""
    kind, _, k = name.partition(".")
    return case.network.structure.batch_norm and kind == "bias" and int(k) < len(WIDTHS)


def assert_equal_gradients(case, got, expected_of):
    for run in range(RUNS):
        expected = expected_of(Reference(case, run))
        assert set(expected) == set(got)
        for name, gradient in expected.items():
            size = gradient.abs().max().item()
            if cancelled(case, name):
                size = 1e-6
            assert size > 1e-5 or cancelled(case, name), name
            found = got[name][run].squeeze(0)
            assert (found.shape, found.dtype) == (gradient.shape, gradient.dtype), name
            assert torch.allclose(found, gradient, rtol=1e-6, atol=1e-6 * size), name


@every_network
@pytest.mark.parametrize("task", TASKS, ids="-".join)
def test_bp_is_autograd(activation, batch_norm, use_bias, dropout, task):
    case = Case("bp", activation, batch_norm, use_bias, dropout, task)
    got, step = case.step()
    losses = []

    def expected(reference):
        gradients, loss = reference.end_to_end()
        losses.append(loss.detach())
        return gradients

    assert_equal_gradients(case, got, expected)
    assert len(losses) == RUNS
    for run, loss in enumerate(losses):
        torch.testing.assert_close(step.loss_per_example[run].mean(), loss, rtol=1e-9, atol=0)


@every_network
@pytest.mark.parametrize(
    ("rule", "task"),
    [
        *(("dfa", task) for task in TASKS),
        *(("drtp", task) for task in CLASSIFICATION[:2]),
        *(("ll-cce", task) for task in CLASSIFICATION[:2]),
        *(("ll-mse", task) for task in [CLASSIFICATION[0], CLASSIFICATION[2], *RECONSTRUCTION[1:]]),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_local_rules_are_gradients_of_their_losses(rule, activation, batch_norm, use_bias, dropout, task):
    case = Case(rule, activation, batch_norm, use_bias, dropout, task)
    got, _ = case.step()
    assert_equal_gradients(case, got, lambda reference: reference.blockwise(local_loss(rule, case.squash)))


@pytest.mark.parametrize(
    ("problem_type", "scaler", "squash"),
    [
        ("classification", "standard", "sigmoid"),
        ("classification", "identity", "sigmoid"),
        ("reconstruction", "standard", "tanh"),
        ("reconstruction", "zero_one", "sigmoid"),
        ("reconstruction", "identity", "identity"),
    ],
)
def test_the_squash_has_the_range_of_the_targets(problem_type, scaler, squash):
    assert squash_for(problem_type, scaler) == squash


def test_dfa_of_one_example_is_the_papers_equation():
    case = Case("dfa", "tanh", False, True, False, CLASSIFICATION[0])
    got, step = case.step()
    e = torch.softmax(step.logits[0], -1) - case.target[0]
    h = torch.tanh(case.inputs[0] @ case.network.parameters["weight.0"][0].T + case.network.parameters["bias.0"][0])
    delta = (e @ case.network.buffers["feedback.0"][0].T) * (1 - h**2)
    by_example = torch.stack([torch.outer(delta[i], case.inputs[0, i]) for i in range(BATCH)])
    torch.testing.assert_close(got["weight.0"][0], by_example.mean(0))


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize(
    ("rule", "task"),
    [*((rule, CLASSIFICATION[0]) for rule in RULES), *((rule, RECONSTRUCTION[2]) for rule in ("bp", "dfa", "ll-mse"))],
)
def test_gradients_are_of_the_batch_mean(rule, task, batch_norm):
    case = Case(rule, "tanh", batch_norm, True, False, task)
    once, twice = case.step()[0], case.step(repeats=2)[0]
    for name in once:
        torch.testing.assert_close(twice[name], once[name], rtol=1e-9, atol=1e-12, msg=name)


def changed_above(case, k):
    """Other weights and feedback in all layers above the k-th."""
    for name, tensor in (case.network.parameters | case.network.buffers).items():
        if int(name.partition(".")[2]) > k:
            tensor.mul_(-1.7).add_(0.1)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("k", range(len(WIDTHS)))
@pytest.mark.parametrize("rule", RULES)
def test_only_local_rules_ignore_what_lies_above(rule, k, batch_norm):
    case = Case(rule, "tanh", batch_norm, True, True, CLASSIFICATION[0])
    before = case.step()[0]
    changed_above(case, k)
    after = case.step()[0]
    for name in before:
        layer = int(name.partition(".")[2])
        if layer <= k and rule in LOCAL:
            assert torch.equal(after[name], before[name]), name
        elif not cancelled(case, name):
            assert not torch.allclose(after[name], before[name], rtol=1e-3, atol=1e-9), name


@pytest.mark.parametrize("k", range(len(WIDTHS)))
def test_dfa_sees_what_lies_above_through_the_output_error_only(k):
    case = Case("dfa", "tanh", True, True, True, CLASSIFICATION[0])
    e = torch.randn(RUNS, BATCH, CLASSES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def hidden_gradients():
        step = Step(case.network, case.inputs, case.target, lambda logits, target: (logits.sum(-1), e.clone()))
        case.rule.gradients(step)
        own = (n for n in case.network.gradients if int(n.partition(".")[2]) <= k)
        return {name: case.network.gradients[name].clone() for name in own}

    before = hidden_gradients()
    changed_above(case, k)
    after = hidden_gradients()
    assert all(torch.equal(after[name], before[name]) for name in before)
    e.mul_(2)
    doubled = hidden_gradients()
    for name in before:
        torch.testing.assert_close(doubled[name], 2 * before[name])


@pytest.mark.parametrize("rule", RULES)
def test_the_output_loss_reaches_hidden_layers_only_where_the_rule_says_so(rule):
    one, other = (Case(rule, "tanh", False, True, False, task).step()[0] for task in CLASSIFICATION[:2])
    for k in range(len(WIDTHS)):
        assert torch.equal(one[f"weight.{k}"], other[f"weight.{k}"]) == (rule in LOCAL)
    assert not torch.allclose(one["weight.3"], other["weight.3"])


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_local_rules_drop_activations_on_the_way_up(rule, dropout, monkeypatch):
    """While layer k runs, only the output of layer k - 1, its input, is alive; not so in bp and dfa."""
    case = Case(rule, "swish", False, True, dropout, CLASSIFICATION[0])
    case.step()
    outputs, alive = [], []
    forward = Layer.forward

    def watched(layer, *arguments, **options):
        alive.append([k for k, output in enumerate(outputs) if output() is not None])
        trace = forward(layer, *arguments, **options)
        outputs.append(weakref.ref(trace.output))
        return trace

    monkeypatch.setattr(Layer, "forward", watched)
    case.step()
    if rule not in LOCAL:
        assert alive == [[], [0], [0, 1], [0, 1, 2]]
    elif dropout:  # what is passed on is a tensor of its own
        assert alive == [[], [], [], []]
    else:
        assert alive == [[], [0], [1], [2]]


@pytest.mark.parametrize("rule", LOCAL)
def test_a_layers_gradient_stands_before_the_next_layer_runs(rule, monkeypatch):
    case = Case(rule, "tanh", True, True, True, CLASSIFICATION[0])
    expected, _ = case.step()
    order = []
    forward = Layer.forward

    def watched(layer, *arguments, **options):
        order.append(("forward", layer.index))
        return forward(layer, *arguments, **options)

    def learned(layer):
        order.append(("learned", layer.index))
        assert torch.equal(layer.weight_gradient, expected[f"weight.{layer.index}"])

    monkeypatch.setattr(Layer, "forward", watched)
    for gradient in case.network.gradients.values():
        gradient.zero_()
    masks = iter(case.masks)
    loss = output_loss(case.loss_name, case.squash)
    step = Step(case.network, case.inputs, case.target, loss, lambda *shape: next(masks), learned)
    case.rule.gradients(step)
    hidden = [(what, k) for k in range(len(WIDTHS)) for what in ("forward", "learned")]
    assert order == [*hidden, ("forward", len(WIDTHS))]


@pytest.mark.parametrize("rule", RULES)
def test_gradients_leave_parameters_inputs_and_feedback_alone(rule):
    case = Case(rule, "relu", True, True, True, CLASSIFICATION[0])
    fixed = {name: t for name, t in case.network.buffers.items() if name.startswith("feedback")}
    everything = [case.inputs, case.target, *case.network.parameters.values(), *fixed.values()]
    before = [tensor.clone() for tensor in everything]
    case.step()
    assert all(torch.equal(now, then) for now, then in zip(everything, before, strict=True))


def test_declarations_of_the_rules():
    declared = {
        name: (sorted(rule.problem_types), rule.needs_bounded_activation, rule.has_feedback, rule.layerwise)
        for name, rule in RULES.items()
    }
    both = ["classification", "reconstruction"]
    assert declared == {
        "bp": (both, False, False, False),
        "dfa": (both, False, True, False),
        "drtp": (["classification"], True, True, True),
        "ll-cce": (["classification"], False, True, True),
        "ll-mse": (both, False, True, True),
    }
    assert {name: set(rule.unused_parameters) for name, rule in RULES.items() if rule.unused_parameters} == {
        "bp": {"bw_init"}
    }


def test_options_of_the_hidden_errors():
    """s multiplies hidden gradients only; through dropout, an error is that of what the layer passes on."""
    case = Case("dfa", "tanh", True, False, True, CLASSIFICATION[0])
    plain, _ = case.step()
    problem = case.rule.problem
    for rule, options, factor in (("dfa", {"hidden_factor": 30.0}, 30.0), ("dfa", {"through_dropout": True}, None)):
        case.rule = RULES[rule](RULES[rule].Options.model_validate(options), problem)
        changed, _ = case.step()
        last = f".{len(WIDTHS)}"
        for name, gradient in changed.items():
            if name.endswith(last):
                assert torch.equal(gradient, plain[name])
            elif factor is not None:
                torch.testing.assert_close(gradient, plain[name] * factor, rtol=1e-9, atol=1e-12)
            else:
                assert not torch.allclose(gradient, plain[name])
    layer, masks = case.network.layers[-2], case.masks
    case.rule = RULES["dfa"](RULES["dfa"].Options(through_dropout=True), problem)
    changed, step = case.step()
    h = case.inputs
    traces = []
    for k, one in enumerate(case.network.hidden):
        traces.append(one.forward(h, case.masks[k]))
        h = traces[-1].passed_on
    error = output_loss(case.loss_name, case.squash)(step.logits, case.target)[1]
    with torch.no_grad():
        layer.backward(traces[-1], layer.feed_back(error) * case.masks[len(WIDTHS) - 1])
    torch.testing.assert_close(layer.weight_gradient, changed[f"weight.{layer.index}"])
    assert len(masks) == len(WIDTHS)

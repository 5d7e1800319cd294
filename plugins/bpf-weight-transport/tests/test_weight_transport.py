"""The rules against their equations written once more, a run and an example at a time; and every rule's contract."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from bpf_weight_transport.direct_kolen_pollack import DirectKolenPollack
from bpf_weight_transport.kolen_pollack import KolenPollack
from bpf_weight_transport.sign_symmetry import SignSymmetry
from torch import Tensor

from bpf.algorithms import Algorithm, Network, Problem, Step, Structure, cross_entropy
from bpf.nn.randomness import Clock, Draws
from bpf.testing import AlgorithmContract

RUNS, BATCH, INPUTS, WIDTHS, CLASSES = [(3, "ortho"), (5, "lecun")], 7, 6, (5, 4), 3


class TestSignSymmetryContract(AlgorithmContract):
    name = "sign-symmetry"


class TestFixedSignSymmetryContract(AlgorithmContract):
    name = "sign-symmetry"
    options: ClassVar = {"variant": "frsf", "scale": "torch"}


class TestBatchwiseSignSymmetryContract(AlgorithmContract):
    name = "sign-symmetry"
    options: ClassVar = {"variant": "brsf"}


class TestKolenPollackContract(AlgorithmContract):
    name = "kp"


class TestDirectKolenPollackContract(AlgorithmContract):
    name = "dkp"


def drop(layer: int, batch: int, units: int) -> Tensor | None:
    """The second of the hidden layers' units half dropped."""
    if layer != 1:
        return None
    mask = (torch.arange(batch)[:, None] + torch.arange(units)) % 2 * 2.0
    return mask.to(torch.float64).repeat(len(RUNS), 1, 1)


def step_of(kind: type[Algorithm], **options: Any) -> Step:
    structure = Structure(INPUTS, WIDTHS, CLASSES, activation="tanh", init="torch")
    network = Network.build(structure, [seed for seed, _ in RUNS], None, torch.float64)
    rule = kind(kind.Options.model_validate(options), Problem("classification", "sigmoid"))
    rule.prepare(network, RUNS)
    drawn = torch.Generator().manual_seed(0)
    inputs = torch.randn(len(RUNS), BATCH, INPUTS, generator=drawn, dtype=torch.float64)
    labels = torch.randint(CLASSES, (len(RUNS), BATCH), generator=drawn)
    target = torch.eye(CLASSES, dtype=torch.float64)[labels]
    draws = Draws([seed for seed, _ in RUNS], Clock(torch.device("cpu")), torch.float64)
    step = Step(network, inputs, target, cross_entropy, drop, draws=draws)
    rule.gradients(step)
    return step


def expected(step: Step, back: Callable[[int, int, Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    """Gradients where `back` (run, layer, δa of the layer above, e) gives each hidden error before its dropout."""
    found = {name: torch.zeros_like(p) for name, p in step.network.parameters.items()}
    for run in range(len(RUNS)):
        own = {name: p[run] for name, p in step.network.parameters.items()}
        for b in range(BATCH):
            h, passed, masks = [], [step.inputs[run, b]], []
            for k, units in enumerate(WIDTHS):
                h.append(torch.tanh(own[f"weight.{k}"] @ passed[-1] + own[f"bias.{k}"][0]))
                mask = drop(k, BATCH, units)
                masks.append(torch.ones(units, dtype=torch.float64) if mask is None else mask[run, b])
                passed.append(h[-1] * masks[-1])
            last = len(WIDTHS)
            a = own[f"weight.{last}"] @ passed[-1] + own[f"bias.{last}"][0]
            error = delta = (torch.softmax(a, -1) - step.target[run, b]) / BATCH
            for k in range(last, -1, -1):
                found[f"weight.{k}"][run] += torch.outer(delta, passed[k])
                found[f"bias.{k}"][run] += delta
                if f"kp.{k}" in found:
                    found[f"kp.{k}"][run] += torch.outer(delta, passed[k])
                if k:
                    if f"dkp.{k - 1}" in found:
                        found[f"dkp.{k - 1}"][run] += torch.outer(passed[k], error)
                    delta = back(run, k, delta, error) * (1 - h[k - 1] ** 2)
                    if "dkp.0" not in found:
                        delta = delta * masks[k - 1]
    return found


def assert_equal(step: Step, wanted: dict[str, Tensor]) -> None:
    assert step.network.gradients.keys() == wanted.keys()
    for name, gradient in step.network.gradients.items():
        torch.testing.assert_close(gradient, wanted[name], msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("variant", ["usf", "frsf", "brsf"])
@pytest.mark.parametrize("scale", ["xavier", "torch"])
def test_sign_symmetry_sends_signs_of_the_weights(variant: str, scale: str) -> None:
    def of(fan_out: int, fan_in: int) -> float:
        return (2 / (fan_out + fan_in)) ** 0.5 if scale == "xavier" else (3 * fan_in) ** -0.5

    step = step_of(SignSymmetry, variant=variant, scale=scale)

    def sizes(run: int, k: int) -> Tensor | float:
        if variant == "frsf":
            return step.network.buffers[f"frsf.{k}"][run]
        if variant == "brsf":
            return step.normal(f"brsf.{k}", *step.network.layers[k].weight.shape[1:])[run].abs()
        return 1.0

    def back(run: int, k: int, delta: Tensor, error: Tensor) -> Tensor:
        weight = step.network.parameters[f"weight.{k}"][run]
        return delta @ (of(*weight.shape) * sizes(run, k) * weight.sign())

    assert_equal(step, expected(step, back))


def test_random_sizes_have_the_deviation_one_and_differ_by_seed_and_layer() -> None:
    structure = Structure(20, (300, 400), 10)
    network = Network.build(structure, [1, 2], None)
    rule = SignSymmetry(SignSymmetry.Options(variant="frsf"), Problem("classification", "sigmoid"))
    rule.prepare(network, [(1, "ortho"), (2, "ortho")])
    sizes = network.buffers["frsf.1"]
    assert sizes.square().mean().sqrt().item() == pytest.approx(1, rel=0.02)
    assert (sizes >= 0).all()
    assert not torch.equal(sizes[0], sizes[1])


def test_kolen_pollack_is_its_equations() -> None:
    step = step_of(KolenPollack)
    assert_equal(step, expected(step, lambda run, k, delta, error: delta @ step.network.parameters[f"kp.{k}"][run]))


def test_kolen_pollack_with_the_weights_as_feedback_is_backpropagation() -> None:
    step = step_of(KolenPollack)
    for k in (1, 2):
        step.network.parameters[f"kp.{k}"].copy_(step.network.parameters[f"weight.{k}"])
    wanted = expected(step, lambda run, k, delta, error: delta @ step.network.parameters[f"weight.{k}"][run])
    again = Step(step.network, step.inputs, step.target, cross_entropy, drop)
    KolenPollack(KolenPollack.Options(), Problem("classification", "sigmoid")).gradients(again)
    assert_equal(again, wanted)


def test_direct_kolen_pollack_is_its_equations() -> None:
    step = step_of(DirectKolenPollack)
    assert_equal(
        step, expected(step, lambda run, k, delta, error: step.network.parameters[f"dkp.{k - 1}"][run] @ error)
    )
    last = len(WIDTHS)
    torch.testing.assert_close(
        step.network.gradients[f"dkp.{last - 1}"], step.network.gradients[f"weight.{last}"].mT, rtol=1e-12, atol=0
    )


def test_feedback_learns_at_its_own_rate() -> None:
    assert step_of(DirectKolenPollack, feedback_rate=0.3).network.rate("dkp.1") == 0.3
    assert step_of(KolenPollack).network.rate("kp.1") == 1.0

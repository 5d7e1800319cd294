"""What the contract is checked with: small networks, one batch of data, and comparisons of what comes out."""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bpf.algorithms import Algorithm, Network, Problem, Step
from bpf.nn.layer import Structure
from bpf.nn.losses import output_loss, squash_for
from bpf.nn.randomness import Clock, Draws, generator
from bpf.spec.run import RunSpec

INPUTS, WIDTHS, CLASSES, BATCH = 5, (6, 4, 7), 3, 8
RUNS = ((3, "ortho"), (4, "lecun"), (5, "frenkel"))

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One kind of network and task; its text names it in a failure."""

    problem_type: str
    activation: str = "tanh"
    batch_norm: bool = False
    use_bias: bool = True
    loss: str = "auto"
    batch: int = BATCH
    dropout: bool = False


class Repeating(Draws):
    """A batch that has every example twice gets the numbers of each twice: `count` examples are not repeated."""

    count = 0

    def normal(self, purpose: str, *shape: int) -> Tensor:
        return self._repeated(super().normal, purpose, shape)

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        if shape[0] == 2:  # those of `normal`
            return super().uniform(purpose, *shape)
        return self._repeated(super().uniform, purpose, shape)

    def _repeated(self, draw: Callable[..., Tensor], purpose: str, shape: tuple[int, ...]) -> Tensor:
        if not self.count or 2 * self.count not in shape:
            return draw(purpose, *shape)
        once = draw(purpose, *(self.count if n == 2 * self.count else n for n in shape))
        return torch.cat([once, once], 1 + shape.index(2 * self.count))


@dataclass(frozen=True)
class Bench:
    """A rule, prepared networks for it, and one batch of data; everything is determined by `case` and `runs`.

    All is float64: `inputs` [runs, batch, inputs], `target` [runs, batch, targets]. `run` takes a step, whose gradients
    then stand in `network.gradients`.
    """

    case: Case
    rule: Algorithm
    network: Network
    inputs: Tensor
    target: Tensor
    seeds: tuple[int, ...]

    @classmethod
    def make(cls, kind: type[Algorithm], options: Mapping[str, Any], case: Case, runs: Any = RUNS) -> "Bench":
        classifies = case.problem_type == "classification"
        squash = squash_for(case.problem_type, "standard")
        rule = kind(kind.Options.model_validate(dict(options)), Problem(case.problem_type, squash))
        targets = CLASSES if classifies else INPUTS
        structure = Structure(INPUTS, WIDTHS, targets, case.activation, case.batch_norm, case.use_bias, "torch")
        seeds, inits = zip(*runs, strict=True)
        network = Network.build(structure, seeds, inits if kind.has_feedback else None, torch.float64)
        rule.prepare(network, list(runs))
        generators = [generator(seed, "contract") for seed in seeds]
        shape = case.batch, INPUTS
        inputs = torch.stack([torch.rand(shape, generator=g, dtype=torch.float64) * 2 - 1 for g in generators])
        labels = torch.stack([torch.randint(CLASSES, (case.batch,), generator=g) for g in generators])
        target = torch.eye(CLASSES, dtype=torch.float64)[labels] if classifies else inputs
        return cls(case, rule, network, inputs, target, seeds)

    def step(self) -> Step:
        spec = RunSpec.model_construct(problem_type=self.case.problem_type, output_loss=self.case.loss)
        loss = output_loss(spec.resolved_loss, self.rule.problem.squash)
        draws = Repeating(self.seeds, Clock(self.inputs.device), torch.float64)
        draws.count = self.case.batch if self.inputs.shape[1] == 2 * self.case.batch else 0
        rates = torch.full((len(self.seeds),), 0.01, dtype=torch.float64)
        step = Step(self.network, self.inputs, self.target, loss, draws=draws, rates=rates)
        step.draw_mask = self.mask if self.case.dropout else step.draw_mask
        return step

    def mask(self, layer: int, batch: int, units: int) -> Tensor:
        """Every third unit dropped, shifted from example to example; an example that is repeated has the same mask."""
        kept = torch.arange(batch)[:, None] % self.case.batch + torch.arange(units) + units
        return (kept % 3 > 0).to(torch.float64).mul(1.5).repeat(len(self.inputs), 1, 1)

    def run(self) -> Step:
        """One step onto gradients that were not a number before."""
        step = self.step()
        for gradient in self.network.gradients.values():
            gradient.fill_(torch.nan)
        with torch.no_grad():
            self.rule.gradients(step)
        return step

    def gradients(self) -> Tensors:
        self.run()
        return {name: gradient.clone() for name, gradient in self.network.gradients.items()}

    def clean_pass(self) -> tuple[Tensor, Tensors]:
        """Logits of a training forward pass done here, and the buffers that it leaves behind."""
        copy = self.network.shadow()
        h = self.inputs
        for layer in copy.hidden:
            mask = self.mask(layer.index, self.case.batch, layer.units) if self.case.dropout else None
            h = layer.forward(h, mask).passed_on
        return copy.output.forward(h).output, copy.buffers

    def states(self) -> Tensors:
        """Copies of what the rule has declared to change by itself."""
        owned = self.network.owned
        return {n: self.network.buffers[n].clone() for n in self.network.buffers.keys() & owned.keys()}

    def restore(self, states: Tensors) -> None:
        for name, tensor in states.items():
            self.network.buffers[name].copy_(tensor)


def close(actual: Tensor, expected: Tensor) -> bool:
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-7, atol=1e-10)


def same(actual: Tensors, expected: Tensors, what: str) -> None:
    for name, tensor in expected.items():
        assert close(actual[name], tensor), f"{what}: {name} differs"


def running(bench: Bench) -> set[str]:
    """Names of the buffers that a forward pass changes."""
    return set(bench.network.state()) - set(bench.network.parameters)


class ReadsBack(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operations that read a tensor's values, or whose results have a shape that depends on them: on a GPU the
    program waits there, and no recording can."""

    NAMES = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2"})

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        indices = [leaf for leaf in tree_leaves(args[1:2]) if isinstance(leaf, Tensor)] if "index" in name else []
        if name in self.NAMES or any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            self.found.add(name)
        return function(*args, **(kwargs or {}))


@contextmanager
def explained(advice: str) -> Iterator[None]:
    """Turn what a rule raises into a failure that says what to do."""
    try:
        yield
    except (RuntimeError, LookupError, ValueError) as error:
        raise AssertionError(f"{advice} ({error})") from error


@contextmanager
def global_generators(seed: int) -> Iterator[Any]:
    """Seed the global generators of torch, NumPy and Python, and put them back afterwards.

    Gives a function that returns their state.
    """

    def state() -> tuple[bytes, ...]:
        numpy_state = np.random.get_state(legacy=False)
        return bytes(torch.get_rng_state().tolist()), repr(numpy_state).encode(), repr(random.getstate()).encode()

    kept = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield state
    finally:
        torch.set_rng_state(kept[0])
        np.random.set_state(kept[1])
        random.setstate(kept[2])

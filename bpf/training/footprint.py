"""How much memory the training of one run takes, found by taking a step of it."""

import sys
import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bpf.algorithms import Algorithm, Problem, Step
from bpf.nn.layer import Structure
from bpf.nn.losses import output_loss, squash_for
from bpf.nn.network import Network
from bpf.nn.optim import StackedOptimizer
from bpf.nn.randomness import Clock, Draws, Dropout
from bpf.spec.run import RunSpec
from bpf.training.steps import EVALUATION_ROWS

_KNOWN: dict[tuple[str, type[Algorithm], int, int], int] = {}


@dataclass(frozen=True)
class Footprint:
    """Bytes of one run.

    `parameters` are numbers, not bytes. `kept` lasts as long as the training: parameters, gradients, the optimizer's
    memory and the feedback; `state` is the part of it that is kept a second time, for the best epoch. `step` and
    `evaluation` are what the tensors of a step, with its batch, and of a batch of the evaluation take on top at most.
    """

    parameters: int
    kept: int
    state: int
    step: int
    evaluation: int


@torch.no_grad()
def footprint(
    spec: RunSpec, rule: type[Algorithm], inputs: int, targets: int, device: torch.device | str = "cpu"
) -> Footprint:
    """What a step of one run of `spec` takes, in single precision. On the device `meta` nothing is computed.

    Raises what a rule raises that needs its numbers, there.
    """
    structure = Structure(
        inputs, spec.widths, targets, spec.activation, spec.batch_norm, use_bias=spec.use_bias, init="torch"
    )
    device = torch.device(device)
    network = Network.empty(structure, 1, rule.has_feedback, device)
    squash = squash_for(spec.problem_type, spec.scaler)
    learner = rule(rule.Options.model_validate(spec.rule_options()), Problem(spec.problem_type, squash))
    learner.prepare(network, [(spec.seed, "lecun")])
    network = network.to(device)
    optimizer = StackedOptimizer(spec.optimizer, network, [spec.lr], [spec.weight_decay], spec.momentum)
    loss, draws = output_loss(spec.resolved_loss, squash), Draws([spec.seed], Clock(device), torch.float32)
    dropout, input_dropout = (
        Dropout([rate], draws, device, torch.float32) for rate in (spec.dropout, spec.input_dropout)
    )
    rates = torch.full((1,), spec.lr, device=device)

    def step() -> None:
        batch = target = torch.zeros(1, spec.batch_size, inputs, device=device)
        mask = input_dropout.mask("inputs", spec.batch_size, inputs)
        batch = batch if mask is None else batch * mask
        if spec.problem_type == "classification":
            target = torch.full((1, spec.batch_size, targets), 1 / targets, device=device)
        step = Step(network, batch, target, loss, dropout.mask, draws=draws, rates=rates)
        learner.gradients(step)
        optimizer.step()
        learner.updated(step)

    step()
    with _Meter() as meter:
        step()
    with _Meter() as evaluation:  # whose images are those of all runs
        rows = torch.zeros(1, EVALUATION_ROWS, inputs, device=device)
        loss(learner.logits(network, rows), torch.zeros(1, EVALUATION_ROWS, targets, device=device))
    kept = [*network.parameters.values(), *network.buffers.values(), *network.gradients.values()]
    kept += [tensor for state in optimizer.state().values() for tensor in state.values()]
    parameters = sum(map(Tensor.numel, network.parameters.values()))
    return Footprint(parameters, _bytes(kept), _bytes(list(network.state().values())), meter.peak, evaluation.peak)


def run_bytes(spec: RunSpec, rule: type[Algorithm], inputs: int, targets: int, examples: int) -> int:
    """The memory of each run of a cohort on a GPU, whose epochs have so many examples: a prediction.

    What it keeps, the network of its best epoch, one step or evaluation, and the order of an epoch, as if no other run
    had its seed.
    """
    alike = {"lr": 1.0, "seed": 0, "bw_init": "lecun", "weight_decay": 0.0, "dropout": 0.5 * bool(spec.dropout)}
    text = spec.model_copy(update=alike).model_dump_json(exclude={"trackers", "tracker_every", "device", "epochs"})
    known = text, rule, inputs, targets
    for device in ("meta", "cpu"):  # on the former there are no values, which a rule may read
        with suppress(Exception, SystemExit):
            if known not in _KNOWN:
                found = footprint(spec, rule, inputs, targets, device)
                _KNOWN[known] = found.kept + found.state + max(found.step, found.evaluation)
    if known not in _KNOWN:
        return sys.maxsize  # it fails, as will be told when it is trained: with nothing else
    return _KNOWN[known] + 8 * examples


def _bytes(tensors: list[Tensor]) -> int:
    storages = {_identity(tensor): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The largest sum of bytes of tensors that were made inside and are alive at the same time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_identity(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = function(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)):
            key = _identity(tensor)
            if key not in given and key not in self._seen:
                storage = tensor.untyped_storage()
                self._seen[key] = weakref.finalize(storage, self._gone, key, storage.nbytes())
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
        return made

    def _gone(self, key: int, size: int) -> None:
        del self._seen[key]
        self._now -= size


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)

"""How much memory one training step of a network needs, measured by taking it."""

import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bpf.algorithms import Problem, Step
from bpf.experiment.directory import Experiment
from bpf.experiment.places import model_path
from bpf.experiment.plugins import load_rules
from bpf.nn.losses import output_loss, squash_for
from bpf.nn.network import Network, Structure
from bpf.nn.optim import StackedOptimizer
from bpf.nn.randomness import Dropout
from bpf.results import models
from bpf.study.cells import Row


@dataclass(frozen=True)
class Memory:
    """Bytes of one run on a CPU.

    `parameters` are numbers, not bytes. `kept` lasts as long as the training: parameters, gradients, the optimizer's
    memory and the feedback. `step` is what the tensors of one step take on top at most.
    """

    parameters: int
    kept: int
    step: int


@torch.no_grad()
def of_cell(experiment: Experiment, row: Row) -> Memory:
    """What a step of a cell's training takes, as its saved model describes it, with a batch of random images.

    Raises UsageError if its model is not there or cannot be read, and BpfError if its rule is not installed. The
    second step is measured, as the optimizer makes its memory in the first.
    """
    model, rule = (
        models.read(model_path(experiment.files / "models", row.rule, row.key)),
        load_rules([row.rule])[row.rule],
    )
    spec = model.spec
    inputs, classes = math.prod(model.shape), len(model.classes)
    targets = inputs if spec.problem_type == "reconstruction" else classes
    structure = Structure(
        inputs, spec.widths, targets, spec.activation, spec.batch_norm, use_bias=spec.use_bias, init=spec.init
    )
    network = Network.build(structure, [spec.seed], [spec.bw_init] if rule.has_feedback else None)
    squash = squash_for(spec.problem_type, spec.scaler)
    learner = rule(rule.Options.model_validate(spec.rule_options()), Problem(spec.problem_type, squash))
    learner.prepare(network, [(spec.seed, spec.bw_init)])
    optimizer = StackedOptimizer(spec.optimizer, network, [spec.lr], [spec.weight_decay], spec.momentum)
    dropout = Dropout([spec.dropout], [spec.seed], 0, torch.device("cpu"), torch.float32)
    batch = torch.rand(1, spec.batch_size, inputs)
    target = batch
    if spec.problem_type == "classification":
        target = torch.eye(classes)[torch.arange(spec.batch_size) % classes][None]

    def step() -> None:
        step = Step(network, batch, target, output_loss(spec.resolved_loss, squash), dropout.mask)
        learner.gradients(step)
        optimizer.step()

    step()
    with _Meter() as meter:
        step()
    kept = [*network.parameters.values(), *network.buffers.values(), *network.gradients.values()]
    kept += [tensor for state in optimizer.state().values() for tensor in state.values()]
    return Memory(sum(map(Tensor.numel, network.parameters.values())), _bytes(kept), meter.peak)


def _bytes(tensors: list[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
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

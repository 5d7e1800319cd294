"""The training loop: one cohort of runs, trained together as one stacked tensor program."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from bpf.algorithms import Algorithm, Layer, Network, Problem, Step
from bpf.data.cache import Data
from bpf.nn.losses import output_loss, squash_for
from bpf.nn.network import Structure
from bpf.nn.optim import StackedOptimizer, State
from bpf.nn.randomness import Dropout, generator, orders
from bpf.spec.run import RunSpec
from bpf.trackers import Probe, Tracker
from bpf.training.feed import Feed, Part

PROBE_SIZE = 256
DIVERGED_LOSS = 1e6
"""A mean loss above it is no training any more, though numbers may stay finite for long after."""
EVALUATION_ROWS = 512

Scores = dict[str, float | None]


@dataclass
class Record:
    """What is known of one run.

    `status` is running, complete or diverged; losses are means per example, errors
    fractions of wrong predictions (None in reconstruction). `train`, `val` and `test` are those of the best epoch,
    counted from 1; `history` has one entry per epoch. `tracked` has one entry per measurement of the trackers, with the
    `step` and the `epoch` (a fraction, 0 before training) that they were taken at; they took `tracking_seconds` of
    `seconds`.
    """

    seed: int
    status: str = "running"
    epochs: int = 0
    best_epoch: int = 0
    objective: float | None = None
    train: Scores | None = None
    val: Scores | None = None
    test: Scores | None = None
    history: dict[str, list[float]] = field(default_factory=dict)
    tracked: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    tracking_seconds: float = 0.0


class Kept(TypedDict):
    """What is kept of a complete run that has left, on the CPU and without the run axis.

    `best` is its network in its best epoch, by the names of `Network.state()`; `network` and `optimizer` are those of
    its end, from where it can go on.
    """

    best: dict[str, Tensor]
    network: NotRequired[dict[str, Tensor]]
    optimizer: NotRequired[State]


class Cohort:
    """Runs of equal structure in training.

    Give specs that differ in learning rate, weight decay, feedback initialisation, dropout rate and seed only.
    `records` has one `Record` per spec, in the order given, whatever order the runs are stacked in. With `layerwise`
    a rule that allows it updates each layer during the forward pass, which needs no gradient memory for more than
    one layer; the numbers are the same. With `keep_final` the runs that train for all of their epochs can go on from
    their end: by `load` in a cohort whose specs have more `epochs`.
    """

    def __init__(
        self,
        specs: Sequence[RunSpec],
        algorithm: type[Algorithm],
        data: Data,
        trackers: dict[str, Tracker] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        layerwise: bool = False,
        keep_final: bool = False,
    ) -> None:
        self.records = [Record(spec.seed) for spec in specs]
        self.epoch = 0
        self.specs = list(specs)
        self._device, self._dtype = torch.device(device), dtype
        self._layerwise = layerwise and algorithm.layerwise
        self._keep_final = keep_final
        self._left: dict[int, Kept] = {}
        self._trackers = trackers or {}
        first = self.specs[0]
        self._feed = Feed(data, first, self._device, dtype)
        self._squash = squash_for(first.problem_type, first.scaler)
        self._loss = output_loss(first.resolved_loss, self._squash)
        options = algorithm.Options.model_validate(first.rule_options())
        self._rule = algorithm(options, Problem(first.problem_type, self._squash))
        # Neighbours with equal learning rates share one optimizer group.
        self._stacked = sorted(range(len(specs)), key=lambda i: (specs[i].lr, specs[i].weight_decay, i))
        self._assemble(self._build(algorithm.has_feedback), None)
        self._best = {name: tensor.clone() for name, tensor in self._network.state().items()}

    @property
    def done(self) -> bool:
        return not self._stacked

    @property
    def _steps(self) -> int:
        """Batches of an epoch."""
        return -(-len(self._feed.train) // self.specs[0].batch_size)

    @property
    def examples(self) -> int:
        """Training examples of one epoch of one run."""
        return len(self._feed.train)

    def best_network(self, run: int) -> dict[str, Tensor]:
        """The network of a complete run's best epoch; `run` counts in the order of the specs.

        Parameters and running statistics on the CPU, by the names of `Network.state()`: weights [out, in], all others
        [1, units]. Raises KeyError for a run that is not complete.
        """
        return self._left[run]["best"]

    @torch.no_grad()
    def run_epoch(self) -> None:
        """Train one epoch, measure, and let runs leave that are finished, diverged or no longer improving."""
        start, trained = time.perf_counter(), list(self._stacked)
        if self.epoch == 0:
            self._track(0)
        parts = {"": self._train()}
        if len(self._feed.val):
            parts["val_"] = self._evaluate(self._network, self._feed.val)
        self.epoch += 1
        unit, interval = self.specs[0].tracking
        if unit == "epochs" and self.epoch % interval == 0:
            self._track(self.epoch * self._steps)
        scores: dict[str, list[float]] = {}
        for prefix, means in parts.items():
            losses, errors = means.tolist()
            scores[f"{prefix}loss"] = losses
            if self._feed.classifies:
                count = len(self._feed.val if prefix else self._feed.train)
                scores[f"{prefix}error"] = [_fraction(error, count) for error in errors]
        improved, leaving = [], []
        for position, sound in enumerate(self._sound(*parts.values())):
            self._log(position, scores)
            better, leaves = self._judge(position, sound)
            if better:
                improved.append(position)
            if leaves:
                leaving.append(position)
        self._keep_best(improved)
        if leaving:
            self._leave(leaving)
        for run in trained:
            self.records[run].seconds += (time.perf_counter() - start) / len(trained)

    def state(self) -> dict[str, Any]:
        """Everything a resume needs, as tensors and plain values."""
        state: dict[str, Any] = {
            "epoch": self.epoch,
            "stacked": list(self._stacked),
            "left": dict(self._left),
            "records": [asdict(record) for record in self.records],
        }
        if self._stacked:
            state |= {"network": self._network.state(), "optimizer": self._optimizer.state(), "best": self._best}
        return state

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state` of a cohort with the same specs, or with the same but for fewer epochs.

        Runs that ended because their epochs did go on if they have more now. Those that stopped early or diverged
        would have done so with more epochs too, and stay as they are. Raises ValueError if the end of a run that is
        to go on was not kept.
        """
        self.epoch = state["epoch"]
        self.records = [Record(**record) for record in state["records"]]
        self._left = dict(state.get("left", {}))
        if longer := [run for run in self._stacked if self._can_go_on(run)]:
            if state["stacked"] or any(self.records[run].epochs != self.epoch for run in longer):
                raise ValueError("The runs did not end together, so they cannot go on together.")
            state = state | self._revive(longer)
        position = {run: i for i, run in enumerate(self._stacked)}
        kept = torch.tensor([position[run] for run in state["stacked"]], dtype=torch.int64)
        self._stacked = list(state["stacked"])
        if self._stacked:
            network = self._network.select(kept)
            for name, tensor in network.state().items():
                tensor.copy_(state["network"][name])
            self._assemble(network, state["optimizer"])
            self._best = {name: tensor.to(self._device) for name, tensor in state["best"].items()}

    def _can_go_on(self, run: int) -> bool:
        """Whether a run that has ended would not have with the epochs that its spec has now."""
        record = self.records[run]
        return record.status == "complete" and record.epochs < self.specs[run].epochs and not self._is_stale(run)

    def _revive(self, runs: list[int]) -> dict[str, Any]:
        """Make runs that have left run again; returns the part of a `state` that is their stack."""
        if lost := [run for run in runs if "network" not in self._left.get(run, ())]:
            raise ValueError(f"The final state of runs {lost} was not kept, so they cannot train for more epochs.")
        left = [self._left.pop(run) for run in runs]
        for run in runs:
            self.records[run].status, self.records[run].test = "running", None
        return {
            "stacked": runs,
            "network": _stack([kept["network"] for kept in left]),
            "optimizer": {
                name: _stack([kept["optimizer"][name] for kept in left]) for name in self._network.parameters
            },
            "best": _stack([kept["best"] for kept in left]),
        }

    def _build(self, has_feedback: bool) -> Network:
        first, specs = self.specs[0], [self.specs[run] for run in self._stacked]
        structure = Structure(
            inputs=self._feed.inputs,
            widths=first.widths,
            targets=self._feed.targets,
            activation=first.activation,
            batch_norm=first.batch_norm,
            use_bias=first.use_bias,
            init=first.init,
        )
        seeds, inits = [spec.seed for spec in specs], [spec.bw_init for spec in specs]
        network = Network.build(structure, seeds, inits if has_feedback else None, self._dtype, self._layerwise)
        self._rule.prepare(network, list(zip(seeds, inits, strict=True)))
        return network.to(self._device)

    def _assemble(self, network: Network, optimizer_state: dict[str, dict[str, Tensor]] | None) -> None:
        specs = [self.specs[run] for run in self._stacked]
        self._network = network
        self._optimizer = StackedOptimizer(
            specs[0].optimizer,
            network,
            [spec.lr for spec in specs],
            [spec.weight_decay for spec in specs],
            specs[0].momentum,
            self._layerwise,
        )
        if optimizer_state is not None:
            self._optimizer.load(optimizer_state)

    def _train(self) -> Tensor:
        """One pass over the training part; returns mean loss and error while training, [2, runs]."""
        specs = [self.specs[run] for run in self._stacked]
        seeds = [spec.seed for spec in specs]
        order = orders(seeds, len(self._feed.train), self.epoch).to(self._device)
        dropout = Dropout([spec.dropout for spec in specs], seeds, self.epoch, self._device, self._dtype)
        augmenting = [generator(seed, "augmentation", self.epoch, self._device) for seed in seeds]
        last = len(self._network.layers) - 1 if self._layerwise else 0
        totals = torch.zeros(2, len(specs), dtype=self._dtype, device=self._device)
        unit, interval = specs[0].tracking
        every = interval if unit == "steps" else 0
        for number, rows in enumerate(torch.split(order, specs[0].batch_size, dim=1), self.epoch * self._steps + 1):
            inputs, target, labels = self._feed.batch(self._feed.train, rows, augmenting)
            step = Step(self._network, inputs, target, self._loss, dropout.mask, self._learned)
            self._rule.gradients(step)
            self._optimizer.step(last)
            self._add(totals, step.loss_per_example, step.logits, labels)
            if every and number % every == 0:
                self._track(number)
        return totals.div_(order.shape[1])

    def _learned(self, layer: Layer) -> None:
        if self._layerwise:
            self._optimizer.step(layer.index)

    def _add(self, totals: Tensor, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        totals[0] += loss.sum(1)
        if self._feed.classifies:
            totals[1] += (logits.argmax(-1) != labels).sum(1)

    def _evaluate(self, network: Network, part: Part) -> Tensor:
        """Mean loss and error [2, runs] of networks in use: running statistics, no dropout, no augmentation."""
        totals = torch.zeros(2, network.runs, dtype=self._dtype, device=self._device)
        everything = torch.arange(len(part), device=self._device)
        for rows in torch.split(everything, EVALUATION_ROWS):  # of any number of runs, so that sums round alike
            batch = self._feed.batch(part, rows[None])
            inputs, target, labels = (tensor.expand(network.runs, *tensor.shape[1:]) for tensor in batch)
            logits = network.logits(inputs)
            self._add(totals, self._loss(logits, target)[0], logits, labels)
        return totals.div_(len(part))

    def _track(self, step: int) -> None:
        """Append what every tracker measures now to the records of the runs in training."""
        if not self._trackers:
            return
        start = time.perf_counter()
        inputs, target = (tensor.expand(self._network.runs, -1, -1) for tensor in self._probe_batch)
        probe = Probe(self._network, self._rule, self._loss, inputs, target)
        values = {
            f"{tracker}/{name}": values.tolist()
            for tracker, instance in self._trackers.items()
            for name, values in instance.measure(probe).items()
        }
        seconds = (time.perf_counter() - start) / len(self._stacked)
        for position, run in enumerate(self._stacked):
            record = self.records[run]
            record.tracking_seconds += seconds
            moment = {"step": step, "epoch": step / self._steps}
            for name, value in (moment | {name: value[position] for name, value in values.items()}).items():
                record.tracked.setdefault(name, []).append(value)

    @cached_property
    def _probe_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the probe: a fixed batch of training examples, [1, examples, ...]."""
        order = torch.randperm(len(self._feed.train), generator=generator(self.specs[0].data_seed, "probe"))
        inputs, target, _ = self._feed.batch(self._feed.train, order[None, :PROBE_SIZE].to(self._device))
        return inputs, target

    def _sound(self, *scores: Tensor) -> list[bool]:
        """Which runs have not diverged: `scores` are means [2, runs], the loss first."""
        sound = torch.stack([score[0] <= DIVERGED_LOSS for score in scores]).all(0)
        for parameter in self._network.parameters.values():
            sound &= parameter.flatten(1).isfinite().all(1)
        return sound.tolist()

    def _log(self, position: int, scores: dict[str, list[float]]) -> None:
        """Append this epoch's `scores` (by name, one value per stacked run) to the run's history."""
        record = self.records[self._stacked[position]]
        record.epochs = self.epoch
        for name, values in scores.items():
            record.history.setdefault(name, []).append(values[position])

    def _judge(self, position: int, sound: bool) -> tuple[bool, bool]:
        """Whether a run's objective is its best so far, and whether the run leaves."""
        run = self._stacked[position]
        record, spec = self.records[run], self.specs[run]
        if not sound:
            record.status = "diverged"
            return False, True
        value = record.history[spec.objective][-1]
        better = record.objective is None or value < record.objective
        if better:
            record.objective, record.best_epoch = value, self.epoch
            record.train = _scores(record.history, "")
            record.val = _scores(record.history, "val_")
        return better, self._is_stale(run) or self.epoch >= spec.epochs

    def _is_stale(self, run: int) -> bool:
        """Whether a run has not improved for as long as early stopping allows."""
        record, patience = self.records[run], self.specs[run].early_stopping
        return 0 < patience <= record.epochs - record.best_epoch

    def _keep_best(self, positions: list[int]) -> None:
        index = torch.tensor(positions, dtype=torch.int64, device=self._device)
        for name, tensor in self._network.state().items():
            self._best[name].index_copy_(0, index, tensor.index_select(0, index))

    def _leave(self, positions: list[int]) -> None:
        """Finish the runs that have not diverged, and go on with the others only."""
        finishing = [p for p in positions if self.records[self._stacked[p]].status != "diverged"]
        self._finish(finishing)
        if self._keep_final:
            network, optimizer = self._network.state(), self._optimizer.state()
            for p in (p for p in finishing if not self._is_stale(self._stacked[p])):
                kept = self._left[self._stacked[p]]
                kept["network"] = _one(network, p)
                kept["optimizer"] = {name: _one(state, p) for name, state in optimizer.items()}
        stay = torch.tensor([p for p in range(len(self._stacked)) if p not in set(positions)], dtype=torch.int64)
        self._stacked = [self._stacked[p] for p in stay.tolist()]
        if self._stacked:
            optimizer = {
                name: {key: tensor[stay.to(tensor.device)] for key, tensor in state.items()}
                for name, state in self._optimizer.state().items()
            }
            self._best = {name: tensor[stay.to(self._device)] for name, tensor in self._best.items()}
            self._assemble(self._network.select(stay), optimizer)

    def _finish(self, positions: list[int]) -> None:
        """Test the best networks and keep them."""
        if not positions:
            return
        scores = self._evaluate(self._best_networks(positions), self._feed.test).tolist()
        for i, position in enumerate(positions):
            run = self._stacked[position]
            record = self.records[run]
            error = _fraction(scores[1][i], len(self._feed.test)) if self._feed.classifies else None
            record.test = {"loss": scores[0][i], "error": error}
            record.status = "complete"
            self._left[run] = {"best": _one(self._best, position)}

    def _best_networks(self, positions: list[int]) -> Network:
        index = torch.tensor(positions, dtype=torch.int64)
        network = self._network.select(index)
        for name, tensor in network.state().items():
            tensor.copy_(self._best[name][index.to(self._device)])
        return network


def _scores(history: dict[str, list[float]], prefix: str) -> Scores | None:
    """The last epoch's loss and error of a part, or None when the part is empty."""
    if f"{prefix}loss" not in history:
        return None
    error = history.get(f"{prefix}error")
    return {"loss": history[f"{prefix}loss"][-1], "error": error[-1] if error else None}


def _fraction(error: float, count: int) -> float:
    """The part of `count` examples that a mean in single precision means."""
    return round(error * count) / count


def _one(stacked: dict[str, Tensor], position: int) -> dict[str, Tensor]:
    """One run's tensors out of stacked ones, as copies on the CPU: a view would keep the whole stack in memory."""
    return {name: tensor[position].to("cpu", copy=True) for name, tensor in stacked.items()}


def _stack(runs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The opposite of `_one`."""
    return {name: torch.stack([run[name] for run in runs]) for name in runs[0]}

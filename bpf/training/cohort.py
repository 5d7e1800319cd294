"""The training loop: one cohort of runs, trained together as one stacked tensor program."""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from bpf.algorithms import Algorithm, Network, Problem
from bpf.data.cache import Data
from bpf.nn.layer import Structure
from bpf.nn.losses import output_loss, squash_for
from bpf.nn.optim import StackedOptimizer, State
from bpf.spec.run import RunSpec
from bpf.trackers import Tracker
from bpf.training.capture import Recorder
from bpf.training.feed import Feed
from bpf.training.record import Kept, Record, fraction
from bpf.training.steps import Evaluation, Steps
from bpf.training.tracking import Tracking
from bpf.training.watch import prepared

DIVERGED_LOSS = 1e6
"""A mean loss above it is no training any more, though numbers may stay finite for long after."""


class Cohort:
    """Runs of equal structure in training.

    Give specs that differ in learning rate, weight decay, feedback initialisation, dropout rate and seed only.
    `records` has one `Record` per spec, in the order given, whatever order the runs are stacked in. With `layerwise`
    a rule that allows it updates each layer during the forward pass, which needs no gradient memory for more than
    one layer; the numbers are the same. With `keep_final` the runs that train for all of their epochs can go on from
    their end: by `load` in a cohort whose specs have more `epochs`. `notice` is told what a person should know, such as
    that the steps of a rule cannot be recorded on CUDA.
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
        notice: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.records = [Record(spec.seed) for spec in specs]
        self.epoch = 0
        self.specs = list(specs)
        self._device, self._dtype = torch.device(device), dtype
        self._layerwise = layerwise and algorithm.layerwise and not specs[0].clip  # which needs all gradients
        self._keep_final, self._notice = keep_final, notice
        self._left: dict[int, Kept] = {}
        first = self.specs[0]
        self._feed = Feed(data, first, self._device, dtype)
        self._squash = squash_for(first.problem_type, first.scaler)
        self._loss = output_loss(first.resolved_loss, self._squash)
        options = algorithm.Options.model_validate(first.rule_options())
        problem = Problem(first.problem_type, self._squash)
        self._rule, self._predictor = algorithm(options, problem), algorithm(options, problem)  # as a model has it
        self._tracking = Tracking(trackers or {}, self._feed, self._rule, self._loss, first)
        # Neighbours with equal learning rates share one call of the optimizer on a CPU.
        self._stacked = sorted(range(len(specs)), key=lambda i: (specs[i].lr, specs[i].weight_decay, i))
        self._assemble(self._build(algorithm.has_feedback), None)
        self._best = {name: tensor.clone() for name, tensor in self._network.state().items()}

    @property
    def done(self) -> bool:
        return not self._stacked

    @property
    def _running(self) -> list[Record]:
        """The records of the stacked runs, in their order."""
        return [self.records[run] for run in self._stacked]

    @property
    def examples(self) -> int:
        """Training examples of one epoch of one run."""
        return len(self._feed.train)

    def best_network(self, run: int) -> dict[str, Tensor]:
        """The network of a complete run's best epoch; `run` counts in the order of the specs.

        What belongs to a model file, on the CPU, by the names of `Network.state()`: weights [out, in], biases and batch
        norm's [1, units], and what the rule has added. Raises KeyError for a run that is not complete.
        """
        saved = self._network.saved()
        return {name: tensor for name, tensor in self._left[run]["best"].items() if name in saved}

    @torch.no_grad()
    def run_epoch(self) -> None:
        """Train one epoch, measure, and let runs leave that are finished, diverged or no longer improving."""
        start, trained = time.perf_counter(), list(self._stacked)
        with self._recorder.stream():
            self._one_epoch()
        for run in trained:
            self.records[run].seconds += (time.perf_counter() - start) / len(trained)

    def _one_epoch(self) -> None:
        if self.epoch == 0:
            self._measure(0)
        parts = {"": self._steps.epoch(self.epoch, self._track)}
        if len(self._feed.val):
            parts["val_"] = self._validation.scores(self._recorder)
        self.epoch += 1
        scores: dict[str, list[float]] = {}
        for prefix, means in parts.items():
            losses, errors = means.tolist()
            scores[f"{prefix}loss"] = losses
            if self._feed.classifies:
                count = len(self._feed.val if prefix else self._feed.train)
                scores[f"{prefix}error"] = [fraction(error, count) for error in errors]
        improved, leaving = [], []
        for position, sound in enumerate(self._sound(*parts.values())):
            run = self._stacked[position]
            self.records[run].log(self.epoch, {name: values[position] for name, values in scores.items()})
            better, leaves = self.records[run].judge(self.specs[run], sound)
            if better:
                improved.append(position)
            if leaves:
                leaving.append(position)
        self._keep_best(improved)
        if leaving:
            self._leave(leaving)

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
        to go on was not kept, and for a state that is not one of these specs.
        """
        self._check(state)
        self.epoch = state["epoch"]
        self.records = [Record(**record) for record in state["records"]]
        self._left = dict(state.get("left", {}))
        if longer := [run for run in self._stacked if self.records[run].can_go_on(self.specs[run])]:
            if state["stacked"] or any(self.records[run].epochs != self.epoch for run in longer):
                raise ValueError("The runs did not end together, so they cannot go on together.")
            state = state | self._revive(longer)
        position = {run: i for i, run in enumerate(self._stacked)}
        kept = torch.tensor([position[run] for run in state["stacked"]], dtype=torch.int64)
        self._stacked = list(state["stacked"])
        if self._stacked:
            network = self._network.select(kept)
            for part in (state["network"], state["best"]):
                network.check_state(part, len(kept))
            self._optimizer.check_state(state["optimizer"], len(kept), self.epoch > 0)
            for name, tensor in network.state().items():
                tensor.copy_(state["network"][name])
            self._assemble(network, {name: self._copies(own) for name, own in state["optimizer"].items()})
            self._best = self._copies(state["best"])

    def _check(self, state: dict[str, Any]) -> None:
        """Raise ValueError for a state that cannot be one of these specs, whatever it is used for."""
        stacked, records, left = state["stacked"], state["records"], state.get("left", {})
        runs, known = set(range(len(self.specs))), {*stacked, *left}
        if len(records) != len(runs) or len(known) != len(stacked) + len(left) or not known <= runs:
            raise ValueError("It is a state of other runs.")
        for run, record in enumerate(records):
            going_on, complete = record["status"] == "running", record["status"] == "complete"
            if not 0 <= record["best_epoch"] <= record["epochs"] <= state["epoch"] or going_on != (run in stacked):
                raise ValueError("A run has another number of epochs than the state, or its end is not kept.")
            if any(len(values) != record["epochs"] for name, values in record["history"].items() if "/" not in name):
                raise ValueError("A run has more or fewer scores than epochs.")
            if complete and (record["objective"] is None or record["test"] is None):
                raise ValueError("A complete run has no scores.")
        for kept in left.values():
            self._network.check_state(kept["best"], None)
            if "network" in kept:
                self._network.check_state(kept["network"], None)
                self._optimizer.check_state(kept["optimizer"], None)

    def _copies(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self._device, copy=True) for name, tensor in tensors.items()}

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
        feedback = inits if has_feedback else None
        network = Network.build(structure, seeds, feedback, self._dtype, self._layerwise, self._device)
        prepared(self._rule, network, list(zip(seeds, inits, strict=True)))
        return network.to(self._device)

    def _assemble(self, network: Network, optimizer_state: State | None) -> None:
        specs = [self.specs[run] for run in self._stacked]
        first = specs[0]
        self._network = network
        self._optimizer = StackedOptimizer(
            first.optimizer,
            network,
            [spec.lr for spec in specs],
            [spec.weight_decay for spec in specs],
            first.momentum,
            self._layerwise,
            optimizer_state,
        )
        able = self._rule.capturable
        self._recorder = Recorder(self._device, f"the rule {first.algorithm}", self._notice, able)
        self._steps = Steps(
            specs, self._rule, network, self._optimizer, self._feed, self._loss, self._recorder, self._layerwise
        )
        self._validation = Evaluation(self._predictor, network, self._feed, self._feed.val, self._loss)

    def _track(self, number: int) -> None:
        step = self.epoch * self._steps.count + number + 1
        if self._tracking.is_due(step):
            self._measure(step)

    def _measure(self, step: int) -> None:
        self._tracking.measure(self._network, step, self._running, self._steps.draws, self._steps.rates)

    def _sound(self, *scores: Tensor) -> list[bool]:
        """Which runs have not diverged: `scores` are means [2, runs], the loss first."""
        sound = torch.stack([score[0] <= DIVERGED_LOSS for score in scores]).all(0)
        for parameter in self._network.parameters.values():
            sound &= parameter.flatten(1).isfinite().all(1)
        return sound.tolist()

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
            for position in finishing:
                run = self._stacked[position]
                if not self.records[run].is_stale(self.specs[run]):
                    kept = self._left[run]
                    kept["network"] = _one(network, position)
                    kept["optimizer"] = {name: _one(state, position) for name, state in optimizer.items()}
        stay = [position for position in range(len(self._stacked)) if position not in set(positions)]
        self._stacked = [self._stacked[position] for position in stay]
        if self._stacked:
            self._keep(torch.tensor(stay, device=self._device))

    def _keep(self, stay: Tensor) -> None:
        """Go on with some of the stacked runs; one tensor after the other, so that no second stack is in memory."""
        network, optimizer = self._network, self._optimizer.state()
        self._recorder.clear()
        del self._optimizer, self._steps, self._validation, self._recorder  # which hold what is replaced
        network.keep(stay)
        for tensors in (*optimizer.values(), self._best):
            for name in tensors:
                tensors[name] = tensors[name].index_select(0, stay)
        self._assemble(network, optimizer)

    def _finish(self, positions: list[int]) -> None:
        """Test the best networks and keep them."""
        if not positions:
            return
        test = Evaluation(self._predictor, self._best_networks(positions), self._feed, self._feed.test, self._loss)
        scores = test.scores(Recorder(self._device, "a test", self._notice, able=False)).tolist()
        for i, position in enumerate(positions):
            run = self._stacked[position]
            record = self.records[run]
            error = fraction(scores[1][i], len(self._feed.test)) if self._feed.classifies else None
            record.complete(scores[0][i], error)
            self._left[run] = {"best": _one(self._best, position)}

    def _best_networks(self, positions: list[int]) -> Network:
        index = torch.tensor(positions, dtype=torch.int64)
        network = self._network.select(index)
        for name, tensor in network.state().items():
            tensor.copy_(self._best[name][index.to(self._device)])
        return network


def _one(stacked: dict[str, Tensor], position: int) -> dict[str, Tensor]:
    """One run's tensors out of stacked ones, as copies on the CPU: a view would keep the whole stack in memory."""
    return {name: tensor[position].to("cpu", copy=True) for name, tensor in stacked.items()}


def _stack(runs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The opposite of `_one`."""
    return {name: torch.stack([run[name] for run in runs]) for name in runs[0]}

"""The measurements of trackers while a cohort trains: on one probe batch, at an interval, and what they cost."""

import time
from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from bpf.algorithms import Algorithm, Network
from bpf.errors import PluginError
from bpf.nn.losses import Loss
from bpf.nn.randomness import Draws, generator
from bpf.registry import TRACKERS, Registry
from bpf.spec.run import RunSpec
from bpf.trackers import Probe, Tracker
from bpf.training.feed import Feed
from bpf.training.record import Record

PROBE_SIZE = 256


class Tracking:
    """The trackers of a cohort, whose runs share what `spec`, that of any of them, says of tracking."""

    def __init__(self, trackers: dict[str, Tracker], feed: Feed, rule: Algorithm, loss: Loss, spec: RunSpec) -> None:
        self._trackers, self._feed, self._rule, self._loss = trackers, feed, rule, loss
        self._seed, self._steps = spec.data_seed, -(-len(feed.train) // spec.batch_size)
        unit, self._interval = spec.tracking
        self._by_steps = unit == "steps"

    def is_due(self, step: int) -> bool:
        """Whether to measure after so many steps, counted from the start; before the first one in any case."""
        interval = self._interval if self._by_steps else self._interval * self._steps
        return step % interval == 0

    def measure(self, network: Network, step: int, records: Sequence[Record], draws: Draws, rates: Tensor) -> None:
        """Append what every tracker measures now to the records of the stacked runs.

        A rule gets the random numbers and learning rates of the step that follows.
        """
        if not self._trackers:
            return
        start = time.perf_counter()
        inputs, target = (tensor.expand(network.runs, -1, -1) for tensor in self._probe_batch)
        probe = Probe(network, self._rule, self._loss, inputs, target, draws, rates)
        values = {
            f"{tracker}/{name}": values.tolist()
            for tracker, instance in self._trackers.items()
            for name, values in _measured(tracker, instance, probe, records[0].tracked).items()
        }
        seconds = (time.perf_counter() - start) / len(records)
        moment = {"step": step, "epoch": step / self._steps}
        for position, record in enumerate(records):
            record.tracking_seconds += seconds
            for name, value in (moment | {name: value[position] for name, value in values.items()}).items():
                record.tracked.setdefault(name, []).append(value)

    @cached_property
    def _probe_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the probe: a fixed batch of training examples, [1, examples, ...]."""
        train = self._feed.train
        order = torch.randperm(len(train), generator=generator(self._seed, "probe"))
        rows = train.index[order[None, :PROBE_SIZE].to(self._feed.device)]
        inputs, target, _ = self._feed.batch(train, rows)
        return inputs, target


def _measured(name: str, tracker: Tracker, probe: Probe, earlier: Iterable[str]) -> dict[str, Tensor]:
    """What a tracker measures. Raises PluginError if it fails, or gives what are not values of each run."""
    try:
        before = {name: tensor._version for name, tensor in probe.network.state().items()}
        values, runs = tracker.measure(probe), torch.Size([probe.network.runs])
        for what, tensor in probe.network.state().items():
            if tensor._version != before[what]:
                raise ValueError(f"it changes the tensor {what} of the networks in training")
        for what, each in values.items():
            if not isinstance(what, str):
                raise TypeError(f"{what!r} is no name")
            if not isinstance(each, Tensor) or each.shape != runs or each.is_complex():
                given = list(each.shape) if isinstance(each, Tensor) else type(each).__name__
                raise TypeError(f"{what} is {given}, and must be a tensor {list(runs)}: one number of each run")
        known = {each for each in earlier if each.startswith(f"{name}/")}
        if known and known != {f"{name}/{what}" for what in values}:
            raise ValueError(f"it measures other things than before: {', '.join(values)}")
        return values
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        called = Registry(TRACKERS).called(name)
        raise PluginError(
            f"The {called} failed: {type(error).__name__}: {error}. Mend, update or leave it out."
        ) from error

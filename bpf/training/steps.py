"""The steps of an epoch, and the evaluation after it, over memory that stays where it is.

What a step reads and writes beside its own temporary tensors was made before it: so it can be recorded (`capture.py`).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bpf.algorithms import Algorithm, Layer, Network, Step
from bpf.nn.losses import Loss
from bpf.nn.optim import StackedOptimizer, clip_
from bpf.nn.randomness import Clock, Draws, Dropout, orders
from bpf.spec.run import RunSpec
from bpf.spec.schedules import factor
from bpf.training.capture import Recorder, held
from bpf.training.feed import Feed, Part
from bpf.training.watch import Watch, check_given

EVALUATION_ROWS = 512


class Steps:
    """The training steps of stacked runs, whose specs differ in what those of a cohort may differ in."""

    def __init__(
        self,
        specs: Sequence[RunSpec],
        rule: Algorithm,
        network: Network,
        optimizer: StackedOptimizer,
        feed: Feed,
        loss: Loss,
        recorder: Recorder,
        layerwise: bool,
    ) -> None:
        self._rule, self._network, self._optimizer = rule, network, optimizer
        self._feed, self._loss, self._recorder = feed, loss, recorder
        self._layerwise, self._last_layer = layerwise, len(network.layers) - 1 if layerwise else 0
        weight = network.parameters["weight.0"]
        device, dtype = weight.device, weight.dtype
        seeds = [spec.seed for spec in specs]
        self._seeds = list(dict.fromkeys(seeds))
        which = [self._seeds.index(seed) for seed in seeds]
        self._which = None if len(self._seeds) == len(seeds) else torch.tensor(which, device=device)
        self._clock = Clock(device)
        self.draws = Draws(seeds, self._clock, dtype)
        self._dropout = Dropout([spec.dropout for spec in specs], self.draws, device, dtype)
        self._input_dropout = Dropout([spec.input_dropout for spec in specs], self.draws, device, dtype)
        rates = torch.tensor([spec.lr for spec in specs], dtype=dtype, device=device)
        self._pace, self._schedule, self._epochs = optimizer.pace, specs[0].schedule, specs[0].epochs
        self.rates, self._clip = self._pace.scaled(rates), specs[0].clip
        self._watch = Watch(rule, layerwise)
        self._augmenting = Draws(self._seeds, self._clock, torch.float32)
        self._shuffles, self._size = specs[0].shuffle, specs[0].batch_size
        self._whole, rest = divmod(len(feed.train), self._size)
        self.count = self._whole + bool(rest)
        self._order = torch.zeros(self._whole, len(self._seeds), self._size, dtype=torch.int64, device=device)
        self._rest = torch.zeros(len(self._seeds), rest, dtype=torch.int64, device=device)
        self._totals = torch.zeros(2, len(specs), dtype=dtype, device=device)

    def epoch(self, epoch: int, after: Callable[[int], None]) -> Tensor:
        """Every batch once, with a call `after` each; returns mean loss and error while training, [2, runs]."""
        self._clock.begin(epoch)
        self._pace.set(factor(self._schedule, epoch, self._epochs))
        self._shuffle(epoch)
        self._totals.zero_()
        for number in range(self.count):
            self._run(number)
            after(number)
        self._watch.check(self._network)
        return self._totals / len(self._feed.train)

    def _run(self, number: int) -> None:
        if number < self._whole:
            self._recorder.run("step", self._whole_step, self._held)
        else:
            self._recorder.run("last step", self._last_step, self._held)

    def _shuffle(self, epoch: int) -> None:
        """Lay out the rows of an epoch, in the order of the data set where the specs ask for it."""
        seeds, size = self._seeds, len(self._feed.train)
        drawn = orders(seeds, size, epoch) if self._shuffles else torch.arange(size).expand(len(seeds), -1)
        rows = self._feed.train.index[drawn.to(self._order.device)]
        whole = self._whole * self._size
        self._order.copy_(rows[:, :whole].reshape(len(rows), self._whole, self._size).transpose(0, 1))
        self._rest.copy_(rows[:, whole:])

    def _whole_step(self) -> None:
        self._step(self._order.index_select(0, self._clock.step_index)[0])

    def _last_step(self) -> None:
        self._step(self._rest)

    def _step(self, rows: Tensor) -> None:
        inputs, target, labels = self._feed.batch(self._feed.train, rows, self._augmenting, self._which)
        mask = self._input_dropout.mask("inputs", *inputs.shape[1:])
        inputs = inputs if mask is None else inputs * mask  # the target may be these very inputs, and stays whole
        step = Step(
            self._network, inputs, target, self._loss, self._dropout.mask, self._learned, self.draws, self.rates
        )
        self._watch.gradients(step)
        if self._clip:
            clip_(self._network.gradients.values(), self._clip)
        self._optimizer.step(self._last_layer)
        self._watch.updated(step)
        add_scores(self._totals, step.loss_per_example, step.logits, labels, self._feed.classifies)
        self._clock.tick()

    def _learned(self, layer: Layer) -> None:
        if self._layerwise:
            self._optimizer.step(layer.index)

    def _held(self) -> dict[str, object]:
        return held(self._rule, self._network)


class Evaluation:
    """Mean loss and error of networks in use on a part: running statistics, no dropout, no augmentation."""

    def __init__(self, rule: Algorithm, network: Network, feed: Feed, part: Part, loss: Loss) -> None:
        self._rule, self._feed, self._part, self._loss = rule, feed, part, loss
        self._network = network.in_use()
        self._absent = network.state().keys() - network.saved()
        self._whole = len(part) // EVALUATION_ROWS  # of any number of runs, so that sums round alike
        whole = self._whole * EVALUATION_ROWS
        self._order, self._rest = part.index[:whole].view(-1, EVALUATION_ROWS), part.index[None, whole:]
        weight = network.parameters["weight.0"]
        self._at = torch.zeros(1, dtype=torch.int64, device=weight.device)
        self._totals = torch.zeros(2, network.runs, dtype=weight.dtype, device=weight.device)

    def scores(self, recorder: Recorder) -> Tensor:
        """Mean loss and error [2, runs]."""
        self._at.zero_()
        self._totals.zero_()
        for _ in range(self._whole):
            recorder.run("evaluation", self._whole_batch)
        if self._rest.shape[1]:
            recorder.run("last evaluation", self._last_batch)
        return self._totals / len(self._part)

    def _whole_batch(self) -> None:
        self._batch(self._order.index_select(0, self._at))
        self._at.add_(1)

    def _last_batch(self) -> None:
        self._batch(self._rest)

    def _batch(self, rows: Tensor) -> None:
        runs = self._network.runs
        batch = self._feed.batch(self._part, rows)
        inputs, target, labels = (tensor.expand(runs, *tensor.shape[1:]) for tensor in batch)
        try:
            logits = self._rule.logits(self._network, inputs)
        except KeyError as error:
            if not self._absent.intersection(error.args):
                raise
            raise ValueError(f"logits needs {error}, which is not in a model: add it with saved=True") from error
        check_given("what logits gives", logits, target.shape)
        add_scores(self._totals, self._loss(logits, target)[0], logits, labels, self._feed.classifies)


def add_scores(totals: Tensor, loss: Tensor, logits: Tensor, labels: Tensor, classifies: bool) -> None:
    """Add a batch's sums of loss and, where the runs classify, of errors to `totals` [2, runs]."""
    totals[0].add_(loss.sum(1))
    if classifies:
        totals[1].add_((logits.argmax(-1) != labels).sum(1))

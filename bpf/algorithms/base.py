"""The seam for learning rules.

A rule fills `network.gradients` for one batch. Write a `ProjectionRule` (one method) when the rule is a loss on
the layer's output projected into target space; write an `Algorithm` when it is anything else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from bpf.nn.layer import Layer, Trace
from bpf.nn.losses import Loss
from bpf.nn.network import Network
from bpf.nn.randomness import Draws
from bpf.spec.values import Frozen


class Options(Frozen):
    """A rule's own options; subclass it inside the rule. Fields become parameters of the grid."""


@dataclass(frozen=True)
class Problem:
    """What a rule may know of the task.

    `squash` names the function whose range is the targets' (`sigmoid` for one-hot labels and pixels in [0, 1],
    `tanh` for pixels in [-1, 1], `identity` for raw pixels).
    """

    problem_type: str
    squash: str


@dataclass
class Step:
    """One batch of every run: `inputs` [runs, batch, inputs] and `target` [runs, batch, targets].

    `draw_mask` gives a scaled dropout mask for (layer, batch, units), the layer by its index, or None.
    `learned` is called with a layer as soon as its gradient stands, by rules that declare `layerwise`.
    `rates` [runs] are the learning rates of this step, and `now` is (epoch, step in it), int64 [2], from 0: both may
    be on a GPU, so compute with them and do not read them.
    After the step `logits` [runs, batch, targets] and `loss_per_example` [runs, batch] hold the output's.
    """

    network: Network
    inputs: Tensor
    target: Tensor
    loss: Loss
    draw_mask: Callable[[int, int, int], Tensor | None] = lambda layer, batch, units: None
    learned: Callable[[Layer], None] = lambda layer: None
    draws: Draws | None = None
    rates: Tensor | None = None
    logits: Tensor = field(init=False)
    loss_per_example: Tensor = field(init=False)
    _masks: dict[int, Tensor | None] = field(default_factory=dict)
    _passed: set[int] = field(default_factory=set)

    @property
    def now(self) -> Tensor:
        return self._draws().now

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """Random numbers in [0, 1), [runs, *shape], determined by each run's seed, the purpose and the step alone.

        Ask once a step for each purpose: the same purpose gives the same numbers.
        """
        return self._draws().uniform(f"rule.{purpose}", *shape)

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """As `uniform`, from the standard normal distribution."""
        return self._draws().normal(f"rule.{purpose}", *shape)

    def _draws(self) -> Draws:
        if self.draws is None:
            raise ValueError("This step has no random numbers: give it `draws`.")
        return self.draws

    def forward(self, layer: Layer, inputs: Tensor) -> Trace:
        """A training forward pass through one layer.

        Further ones in the same step use the same dropout mask, and leave batch norm's running statistics alone.
        """
        if layer.index not in self._masks:
            shape = layer.index, len(inputs[0]), layer.units
            self._masks[layer.index] = None if layer.is_output else self.draw_mask(*shape)
        counts = layer.index not in self._passed
        self._passed.add(layer.index)
        return layer.forward(inputs, self._masks[layer.index], counts=counts)

    def forward_hidden(self) -> list[Trace]:
        """A training forward pass through every hidden layer, keeping what a backward pass over all of them needs."""
        traces: list[Trace] = []
        for layer in self.network.hidden:
            traces.append(self.forward(layer, traces[-1].passed_on if traces else self.inputs))
        return traces

    def masked(self, layer: Layer, error: Tensor) -> Tensor:
        """An error of what `layer` passed on, taken back through its dropout: an error of its h."""
        mask = self._masks.get(layer.index)
        return error if mask is None else error.mul_(mask)

    def output_error(self, trace: Trace) -> Tensor:
        """e = ∂L_out/∂a_out of the batch mean, [runs, batch, targets], from the output layer's trace."""
        self.logits = trace.output
        self.loss_per_example, error = self.loss(trace.output, self.target)
        return error

    def train_output(self, inputs: Tensor) -> Tensor:
        """Write the output layer's own true gradient and return e."""
        trace = self.forward(self.network.output, inputs)
        error = self.output_error(trace)
        return self.network.output.backward(trace, error)


class Algorithm:
    """A learning rule. Subclass it, describe it in the docstring's first line, and implement `gradients`."""

    equation: ClassVar[str] = ""
    """What the rule computes, in one line."""
    reference: ClassVar[str] = ""
    """Author, year and title of the source."""
    problem_types: ClassVar[frozenset[str]] = frozenset({"classification", "reconstruction"})
    needs_bounded_activation: ClassVar[bool] = False
    """Whether the rule is known to diverge with an activation that is not bounded."""
    has_feedback: ClassVar[bool] = True
    """Whether hidden layers get a fixed random feedback matrix F [units, targets]."""
    feeds_target: ClassVar[bool] = False
    """Whether the feedback is that of the target, of which the output error has the opposite sign: so the output
    layer's weights align with -F^T, which trackers must know."""
    unused_parameters: ClassVar[frozenset[str]] = frozenset()
    """Parameters of the grid that mean nothing to the rule."""
    layerwise: ClassVar[bool] = False
    """Whether each hidden layer's gradient stands during the forward pass, so that its update can be applied
    before the next layer runs; such a rule calls `step.learned(layer)`."""
    capturable: ClassVar[bool] = True
    """Whether a step is the same operations every time, on tensors that stay where they are, so that CUDA can record
    and replay it. Not so for a rule that decides by a Python counter or reads values back; what bpf notices of that by
    itself it says, and calls the rule for every step."""

    class Options(Options):
        """None."""

    def __init__(self, options: Options, problem: Problem) -> None:
        self.options = options
        self.problem = problem

    def prepare(self, network: Network, runs: Sequence[tuple[int, str]]) -> None:
        """Add the rule's own tensors [runs, ...], from each run's (seed, bw_init).

        Fixed ones go into `network.buffers`; what learns or changes is added by `network.add_parameter` and
        `network.add_state`. What changes in any other way is lost when a run is resumed, and refused.
        """

    def gradients(self, step: Step) -> None:
        """Write every gradient of `step.network` for this batch, as gradients of the batch mean.

        Must set `step.logits` and `step.loss_per_example`, which `step.train_output` does.
        """
        raise NotImplementedError

    def updated(self, step: Step) -> None:
        """Called after the optimizer's step, to change states by the new parameters, or what is done to these."""

    def logits(self, network: Network, inputs: Tensor) -> Tensor:
        """What the networks in use predict for `inputs` [runs, batch, inputs], [runs, batch, targets].

        For validation, early stopping, the test and saved models: of these tensors only parameters, running statistics
        and what is declared `saved` is there, and the rule is made anew, without `prepare`. The output layer's
        pre-activations, unless a rule predicts otherwise.
        """
        return network.logits(inputs)

    def backward_weights(self, network: Network, layer: Layer) -> Tensor | None:
        """What takes an error back through `layer` in place of its weight, [runs, out, in], for trackers to compare.

        None, unless a rule has such weights: backpropagation has the weight itself, and other rules have none.
        """
        return None


class ProjectionRule(Algorithm):
    """A rule whose hidden error is `δh = t F^T`, injected after the activation and before dropout.

    t, the teaching signal, is the gradient of a loss on the projection `p = h F`. From δh the chain rule runs
    inside the layer's own block only: activation, batch norm, linear map.
    """

    needs_output_error: ClassVar[bool] = False
    """Whether the signal depends on e; if not, a layer's activations are dropped as soon as it has learned."""
    needs_projection: ClassVar[bool] = True
    """Whether the signal depends on p; if not, p is not computed."""

    def hidden_error(self, step: Step, layer: Layer, signal: Tensor) -> Tensor:
        """δh of a layer, [runs, batch, units], by its teaching signal t: `t F^T`."""
        return layer.feed_back(signal)

    def teaching_signal(self, projected: Tensor | None, target: Tensor, output_error: Tensor | None) -> Tensor:
        """t = ∂L/∂p, [runs, batch, targets], for the batch mean.

        `projected` p, `target` y and `output_error` e are [runs, batch, targets]; p and e are None when the
        rule does not declare that it needs them.
        """
        raise NotImplementedError

    def local_loss(self, projected: Tensor, target: Tensor, output_error: Tensor) -> Tensor:
        """The loss that a layer learns from, the batch mean of each run, [runs].

        Here `⟨p, t⟩`, whose gradient t is as long as t does not depend on p. A rule whose signal does overrides this.
        """
        return (projected * self.teaching_signal(projected, target, output_error)).sum((1, 2))

    def gradients(self, step: Step) -> None:
        waiting: list[Trace] = []
        h = step.inputs
        for layer in step.network.hidden:
            trace = step.forward(layer, h)
            h = trace.passed_on
            if self.needs_output_error:
                waiting.append(trace)
            else:
                self._learn(step, trace, None)
                del trace
        error = step.train_output(h)
        for trace in waiting:
            self._learn(step, trace, error)

    def _learn(self, step: Step, trace: Trace, output_error: Tensor | None) -> None:
        layer = trace.layer
        projected = layer.project(trace.output) if self.needs_projection else None
        signal = self.teaching_signal(projected, step.target, output_error)
        layer.backward(trace, self.hidden_error(step, layer, signal))
        if self.layerwise:
            step.learned(layer)

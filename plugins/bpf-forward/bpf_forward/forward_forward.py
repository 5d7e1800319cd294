"""The forward-forward algorithm, with its own loss or SymBa's."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from bpf.algorithms import Algorithm, Network, Step

TINY = 1e-8


class ForwardForward(Algorithm):
    """Forward-forward: each layer learns to be active if the label in the input is right, and quiet if it is wrong.

    A label is put into an input by replacing its first `targets` pixels by `label_scale` times the one-hot label.
    Positive inputs have the right one, negative ones a wrong one, drawn anew for every example in every step, and
    neutral ones 1/targets for each. A layer gets what the one below passes on, divided by its root mean square, so
    that only its direction passes. With its goodness g, the sum of its squared outputs h before dropout, it learns from
    a loss of its own, of the batch mean:

        hinton  softplus(θ - g⁺) + softplus(g⁻ - θ)
        symba   softplus(-α (g⁺ - g⁻))

    so `δh⁺ = -2 σ(θ - g⁺) h⁺ / B` and `δh⁻ = 2 σ(g⁻ - θ) h⁻ / B`, or with symba `∓2 α σ(-α (g⁺ - g⁻)) h / B`; nothing
    goes to the layer below. θ is `threshold` times the units n. With `goodness: mean` g, θ and δh are 1/n of that.
    Positive, negative and neutral examples go through a layer as one batch [runs, 3 batch, units]: that is what
    batch norm normalises and dropout draws for. The output layer learns to read the label from the last hidden
    layer's direction for neutral inputs, and its loss is the one that is reported in training.

    The prediction is the label with the most goodness, summed over all layers but the first if there are more, as
    logits; or with `predict: readout` the output layer's.
    """

    equation = "δh_k = -2 σ(θ - g_k) h_k / B for the right label, 2 σ(g_k - θ) h_k / B for a wrong one"
    reference = (
        "Hinton 2022, The Forward-Forward Algorithm: Some Preliminary Investigations; symba: Lee & Song 2023, SymBa: "
        "Symmetric Backpropagation-Free Contrastive Learning with Forward-Forward Algorithm for Optimizing Convergence"
    )
    problem_types = frozenset({"classification"})
    has_feedback = False
    unused_parameters = frozenset({"bw_init"})
    layerwise = True

    class Options(Algorithm.Options):
        """Of the labels, the layers' losses and the prediction."""

        loss: Literal["hinton", "symba"] = Field(
            "hinton", description="Each goodness against a threshold, or the right label's against the wrong one's."
        )
        goodness: Literal["sum", "mean"] = Field("sum", description="Of a layer's squared outputs.")
        threshold: float = Field(
            0.5,
            ge=0,
            le=100,
            description="Threshold θ of hinton, per unit; below 1 for an activation that stays within ±1.",
        )
        alpha: float = Field(4.0, gt=0, le=1000, description="Steepness α of symba.")
        label_scale: float = Field(
            1.0, gt=0, le=1000, description="Value of the label's pixel, the others being 0; pixels are in [-1, 1]."
        )
        predict: Literal["goodness", "readout"] = Field(
            "goodness", description="By trying all labels, or by the output layer in one pass."
        )

    options: Options

    def prepare(self, network: Network, runs: Sequence[tuple[int, str]]) -> None:
        inputs, targets = network.structure.inputs, network.structure.targets
        if targets > inputs:
            raise ValueError(f"ff puts the label into the first pixels: {inputs} are too few for {targets} classes.")

    def gradients(self, step: Step) -> None:
        batch, labels = step.inputs.shape[1], (step.target, self._wrong(step), self._neutral(step.target))
        h = normalised(torch.cat([self._labelled(step.inputs, label) for label in labels], 1))
        for layer in step.network.hidden:
            trace = step.forward(layer, h)
            layer.backward(trace, self._error(trace.output, batch))
            h = normalised(trace.passed_on)
            step.learned(layer)
        step.train_output(h[:, 2 * batch :])

    def logits(self, network: Network, inputs: Tensor) -> Tensor:
        shape = *inputs.shape[:2], network.structure.targets
        if self.options.predict == "readout":
            *_, h = self._outputs(network, self._labelled(inputs, self._neutral(inputs.new_zeros(shape))))
            return network.output.forward(normalised(h), training=False).output
        counted = slice(1 if len(network.hidden) > 1 else 0, None)
        goodness = []
        for label in torch.eye(shape[-1], dtype=inputs.dtype, device=inputs.device):
            outputs = list(self._outputs(network, self._labelled(inputs, label.expand(shape))))
            goodness.append(torch.stack([self._goodness(h) for h in outputs[counted]]).sum(0))
        return torch.stack(goodness, -1)

    def _outputs(self, network: Network, inputs: Tensor) -> Iterator[Tensor]:
        """What each hidden layer in use gives for labelled inputs."""
        h = inputs
        for layer in network.hidden:
            h = layer.forward(normalised(h), training=False).output
            yield h

    def _labelled(self, inputs: Tensor, label: Tensor) -> Tensor:
        return torch.cat([label * self.options.label_scale, inputs[..., label.shape[-1] :]], -1)

    def _neutral(self, target: Tensor) -> Tensor:
        return torch.full_like(target, 1 / target.shape[-1])

    def _wrong(self, step: Step) -> Tensor:
        """One-hot labels, each of the wrong ones with the same probability."""
        classes = step.target.shape[-1]
        away = (step.uniform("negative", step.target.shape[1]) * (classes - 1)).long() + 1
        wrong = (step.target.argmax(-1) + away) % classes
        return torch.zeros_like(step.target).scatter_(-1, wrong[..., None], 1)

    def _goodness(self, h: Tensor) -> Tensor:
        squares = h.square()
        return squares.mean(-1) if self.options.goodness == "mean" else squares.sum(-1)

    def _error(self, h: Tensor, batch: int) -> Tensor:
        """∂L/∂h of a layer's own loss, for positive, negative and neutral examples."""
        positive, negative, neutral = self._goodness(h).chunk(3, 1)
        units = 1 if self.options.goodness == "mean" else h.shape[-1]
        threshold, alpha = self.options.threshold * units, self.options.alpha
        if self.options.loss == "hinton":
            up, down = torch.sigmoid(threshold - positive), torch.sigmoid(negative - threshold)
        else:
            up = down = torch.sigmoid(alpha * (negative - positive)).mul_(alpha)
        slope = torch.cat([-up, down, torch.zeros_like(neutral)], 1)
        return h * slope.mul_(2 * units / (batch * h.shape[-1]))[..., None]


def normalised(h: Tensor) -> Tensor:
    """h over its root mean square, so that its length is the root of the number of units; zero stays zero."""
    return h / (h.square().mean(-1, keepdim=True).sqrt() + TINY)

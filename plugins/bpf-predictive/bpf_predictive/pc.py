"""Predictive coding."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from bpf.algorithms import Algorithm, Step, Trace


class PredictiveCoding(Algorithm):
    """Predictive coding: hidden values relax to fit input and target, then each layer learns to predict its own.

    Every hidden layer has values x_k, [runs, batch, units], beside its prediction `μ_k = f(W_k x_{k-1} + b_k)` of them,
    where x_0 is the input. Of one example the energy is `E = Σ_k ½ ‖x_k - μ_k‖² + L(W_out x_H + b_out)`, with L the
    loss of the output layer, which holds the target. The x_k start as the forward pass and go down E together, `steps`
    times: with the errors `ε_k = μ_k - x_k` and `ε_out = ∂L/∂a_out`, and J the derivative of the layer above,

        x_k ← x_k + rate · (ε_k - J_{k+1}^T ε_{k+1})

    Then every parameter, those of the output layer too, follows ∂E/∂θ at these x, as the mean over the batch; a
    layer's is `ε_k ∂μ_k/∂θ`. With `inference` fixed, predictions and derivatives stay those of the forward pass. Then ε
    tends to backpropagation's δh, and with a rate of 1 reaches it in as many steps as there are hidden layers.

    Dropout stands between the x of one layer and the prediction of the next, with one mask in all steps. Batch norm is
    part of a prediction, with the statistics of the batch at the present x, through which the derivatives go; the
    running statistics follow the forward pass only.
    """

    equation = "x_k ← x_k - r ∂E/∂x_k, then ∂E/∂W;  E = Σ_k ½ ‖x_k - f(W_k x_{k-1} + b_k)‖² + L_out"
    reference = (
        "Whittington & Bogacz 2017, An Approximation of the Error Backpropagation Algorithm in a Predictive Coding "
        "Network with Local Hebbian Synaptic Plasticity; Rosenbaum 2022, On the Relationship between Predictive Coding "
        "and Backpropagation"
    )
    problem_types = frozenset({"classification", "reconstruction"})
    has_feedback = False
    unused_parameters = frozenset({"bw_init"})

    class Options(Algorithm.Options):
        """Of the inference."""

        inference: Literal["strict", "fixed"] = Field(
            "strict",
            description="strict: predictions follow the values; fixed: they stay those of the forward pass.",
        )
        steps: int = Field(
            20,
            ge=1,
            le=1000,
            description="Steps of the inference, T in papers. An error comes down by one layer in each.",
        )
        rate: float = Field(0.1, gt=0, le=1, description="Rate of the inference r, how far each step goes.")

    options: Options

    def gradients(self, step: Step) -> None:
        output, batch = step.network.output, step.inputs.shape[1]
        traces = step.forward_hidden()
        traces.append(step.forward(output, traces[-1].passed_on))
        step.output_error(traces[-1])
        running = [
            (t, t.clone()) for layer in step.network.hidden for t in (layer.mean, layer.variance) if t is not None
        ]
        values = [trace.output for trace in traces[:-1]]
        for _ in range(self.options.steps):
            values = self._relaxed(step, traces, values)
            if self.options.inference == "strict":
                traces = _predicted(step, traces[0], values)
        for tensor, before in running:
            tensor.copy_(before)
        output.backward(traces[-1], step.loss(traces[-1].output, step.target)[1])
        for trace, value in zip(traces[:-1], values, strict=True):
            trace.layer.backward(trace, (trace.output - value).div_(batch))

    def _relaxed(self, step: Step, traces: list[Trace], values: list[Tensor]) -> list[Tensor]:
        """The hidden values after one step, from the output down; errors are those of single examples."""
        upper = traces[-1]
        error = step.loss(upper.output, step.target)[1].mul_(step.inputs.shape[1])
        moved: list[Tensor] = []
        for trace, value in zip(traces[-2::-1], reversed(values), strict=True):
            # Writes gradients, too: those of the last pass, in `gradients`, count.
            delta = upper.layer.backward(upper, error)
            from_above = step.masked(trace.layer, upper.layer.input_error(delta))
            upper, error = trace, trace.output - value
            moved.append(torch.add(value, error - from_above, alpha=self.options.rate))
        return moved[::-1]


def _predicted(step: Step, first: Trace, values: list[Tensor]) -> list[Trace]:
    """Every layer's prediction from the values below it; the first layer's stays, as its input does."""
    traces = [first]
    for layer, value in zip(step.network.layers[1:], values, strict=True):
        dropped = step.masked(step.network.layers[layer.index - 1], value.clone())
        traces.append(step.forward(layer, dropped))
    return traces

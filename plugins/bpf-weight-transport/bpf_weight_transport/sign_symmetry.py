"""Sign symmetry, in three variants."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from bpf.algorithms import Algorithm, Layer, Network, Step, random_feedback


class SignSymmetry(Algorithm):
    """Sign symmetry: backpropagation that knows of each weight only its sign.

    `δh_k = δa_{k+1} B_{k+1}`, through dropout, with B shaped as W, [runs, units_{k+1}, units_k]:

        usf   B = s sign(W)
        frsf  B = |M| ⊙ sign(W), M from N(0, s²), fixed
        brsf  the same, M drawn anew in every step

    s is √(2 / (fan-in + fan-out)) (`xavier`) or √(1 / (3 fan-in)) (`torch`), the deviation of weights so initialised,
    as in BioTorch.
    """

    equation = "δh_k = δa_{k+1} (|M| ⊙ sign(W_{k+1}))"
    reference = (
        "Liao, Leibo & Poggio 2016, How Important Is Weight Symmetry in Backpropagation?; Moskovitz, Litwin-Kumar & "
        "Abbott 2018, Feedback alignment in deep convolutional networks"
    )
    problem_types = frozenset({"classification", "reconstruction"})
    has_feedback = False
    unused_parameters = frozenset({"bw_init"})

    class Options(Algorithm.Options):
        """Of the backward weights."""

        variant: Literal["usf", "frsf", "brsf"] = Field(
            "usf", description="Their sizes: all equal, random and fixed, or random in every step."
        )
        scale: Literal["xavier", "torch"] = Field("xavier", description="The initialisation whose deviation they have.")

    options: Options

    def prepare(self, network: Network, runs: Sequence[tuple[int, str]]) -> None:
        if self.options.variant == "frsf":
            for layer in network.layers[1:]:
                rows, columns = layer.weight.shape[1:]
                name = f"frsf.{layer.index}"
                drawn = random_feedback([(seed, "lecun") for seed, _ in runs], name, rows, columns, layer.weight.dtype)
                network.buffers[name] = drawn.abs() * rows**0.5  # from N(0, 1/rows) to N(0, 1)

    def gradients(self, step: Step) -> None:
        traces = step.forward_hidden()
        upper, delta = step.network.output, step.train_output(traces[-1].passed_on)
        for trace in reversed(traces):
            error = step.masked(trace.layer, torch.bmm(delta, self._backward(step, upper)))
            upper, delta = trace.layer, trace.layer.backward(trace, error)

    def _backward(self, step: Step, layer: Layer) -> Tensor:
        fan_out, fan_in = layer.weight.shape[1:]
        scale = (2 / (fan_in + fan_out)) ** 0.5 if self.options.scale == "xavier" else (1 / (3 * fan_in)) ** 0.5
        signs = layer.weight.sign()
        if self.options.variant == "frsf":
            signs.mul_(step.network.buffers[f"frsf.{layer.index}"])
        elif self.options.variant == "brsf":
            signs.mul_(step.normal(f"brsf.{layer.index}", fan_out, fan_in).abs_())
        return signs.mul_(scale)

"""Direct Kolen-Pollack learning."""

from collections.abc import Sequence

import torch
from pydantic import Field

from bpf.algorithms import Algorithm, Network, Step, random_feedback


class DirectKolenPollack(Algorithm):
    """Direct Kolen-Pollack: direct feedback alignment whose feedback matrices learn from the layers' outputs.

    `δh_k = e F_k^T`, injected after the activation and before dropout, and `∂F_k = h_k^T e`, summed over the batch,
    with h_k as it is passed on. F [runs, units, targets] begins with the run's `bw_init`, and learns `feedback_rate`
    times as fast as the weights. In the last hidden layer F learns by the transpose of the output layer's updates.
    """

    equation = "δh_k = e F_k^T,  ∂F_k = h_k^T e"
    reference = "Webster, Choi & Ahn 2020, Learning the Connections in Direct Feedback Alignment"
    problem_types = frozenset({"classification", "reconstruction"})
    has_feedback = False

    class Options(Algorithm.Options):
        """Of the feedback matrices."""

        feedback_rate: float = Field(
            0.2,
            gt=0,
            le=100,
            description="Their learning rate, as a multiple of the weights'; the authors take 0.2.",
        )

    options: Options

    def prepare(self, network: Network, runs: Sequence[tuple[int, str]]) -> None:
        for layer in network.hidden:
            name = f"dkp.{layer.index}"
            drawn = random_feedback(runs, name, layer.units, network.structure.targets, layer.weight.dtype)
            network.add_parameter(name, drawn, rate=self.options.feedback_rate)

    def gradients(self, step: Step) -> None:
        network = step.network
        traces = step.forward_hidden()
        error = step.train_output(traces[-1].passed_on)
        for trace in traces:
            name = f"dkp.{trace.layer.index}"
            torch.bmm(trace.passed_on.mT, error, out=network.gradients[name])
            trace.layer.backward(trace, torch.bmm(error, network.parameters[name].mT))

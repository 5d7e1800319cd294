"""The losses that the layers learn from."""

from torch import Tensor

from bpf.algorithms import ProjectionRule, Step
from bpf.trackers.base import Probe, Tracker


class LocalLoss(Tracker):
    """The loss that each hidden layer learns from, and the output layer's own; mean per example.

    Of a rule that is not a loss on the layers' projections, such as bp, only the output layer has one.
    """

    def measure(self, probe: Probe) -> dict[str, Tensor]:
        network = probe.network.shadow()
        step = Step(network, probe.inputs, probe.target, probe.loss)
        traces = step.forward_hidden()
        error = step.train_output(traces[-1].passed_on if traces else probe.inputs)
        values = {}
        if isinstance(probe.rule, ProjectionRule):
            for trace in traces:
                projected = trace.layer.project(trace.output)
                values[f"layer.{trace.layer.index}"] = probe.rule.local_loss(projected, probe.target, error)
        values[f"layer.{network.output.index}"] = step.loss_per_example.mean(1)
        return values

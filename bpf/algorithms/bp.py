"""Backpropagation, the control that the other rules are compared with."""

from bpf.algorithms.base import Algorithm, Step


class Backpropagation(Algorithm):
    """Backpropagation: the true gradient of the output loss in every layer (the control).

    The hidden error of layer k, [runs, batch, units], is `δh_k = δa_{k+1} W_{k+1}`, through dropout.
    """

    equation = "δh_k = δa_{k+1} W_{k+1}"
    reference = "Rumelhart, Hinton & Williams 1986, Learning representations by back-propagating errors"
    problem_types = frozenset({"classification", "reconstruction"})
    has_feedback = False
    unused_parameters = frozenset({"bw_init"})

    def gradients(self, step: Step) -> None:
        traces = step.forward_hidden()
        upper, delta = step.network.output, step.train_output(traces[-1].passed_on)
        for trace in reversed(traces):
            error = step.masked(trace.layer, upper.input_error(delta))
            upper, delta = trace.layer, trace.layer.backward(trace, error)

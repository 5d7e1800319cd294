"""Shallow learning, the lower bound."""

from bpf.algorithms import Algorithm, Step


class Shallow(Algorithm):
    """Shallow learning: hidden layers keep their initial weights, only the output layer learns (the lower bound).

    All hidden gradients are zero; the output layer gets its own true gradient of the batch mean. Batch norm's
    running statistics still follow the data.
    """

    equation = "δh_k = 0"
    reference = (
        "the control of Frenkel, Lefebvre & Bol 2021, Learning Without Feedback: Fixed Random Learning Signals Allow "
        "for Feedforward Training of Deep Neural Networks"
    )
    problem_types = frozenset({"classification", "reconstruction"})
    has_feedback = False
    unused_parameters = frozenset({"bw_init"})

    def gradients(self, step: Step) -> None:
        h = step.inputs
        for layer in step.network.hidden:
            h = step.forward(layer, h).passed_on
            for gradient in (layer.weight_gradient, layer.bias_gradient, layer.scale_gradient, layer.shift_gradient):
                if gradient is not None:
                    gradient.zero_()
        step.train_output(h)

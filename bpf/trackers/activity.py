"""What the hidden units do."""

import torch
from torch import Tensor

from bpf.trackers.base import Probe, Tracker

QUANTILES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
FLAT = 0.05


class Activations(Tracker):
    """Of each hidden layer's outputs: the distribution, dead units and saturation.

    As the network is in use (running statistics, no dropout), over the probe batch. `mean` and `std`; `q00` to `q100`,
    the deciles: a histogram whose eleven edges hold a tenth of the outputs between them. `dead`: the fraction
    of units whose output is the same for every example. `saturated`: the fraction of outputs where the activation's
    slope is less than 5 % of its largest on the batch.
    """

    def measure(self, probe: Probe) -> dict[str, Tensor]:
        values = {}
        h = probe.inputs
        for layer in probe.network.hidden:
            trace = layer.forward(h, training=False)
            h = trace.passed_on
            assert layer.activation is not None
            kept = trace.output if trace.before is None else trace.before
            slope = layer.activation.backward(torch.ones_like(h), kept).abs_()
            name = f"layer.{layer.index}"
            outputs = trace.output.flatten(1)
            values[f"{name}.mean"] = outputs.mean(1)
            values[f"{name}.std"] = outputs.std(1)
            values[f"{name}.dead"] = (trace.output.amax(1) == trace.output.amin(1)).to(h.dtype).mean(1)
            largest = slope.amax((1, 2), keepdim=True)
            values[f"{name}.saturated"] = (slope < FLAT * largest).to(h.dtype).mean((1, 2))
            # Sorted once; torch.quantile refuses more than 16 million numbers.
            ordered = outputs.sort(1).values
            for quantile in QUANTILES:
                values[f"{name}.q{round(100 * quantile):02d}"] = ordered[:, round(quantile * (ordered.shape[1] - 1))]
        return values

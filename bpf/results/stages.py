"""The parts of a saved network as modules of torch, with the very operations of training for one run alone."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bpf.algorithms import Problem
from bpf.errors import UsageError
from bpf.experiment.grid import check_run
from bpf.experiment.plugins import load_rules
from bpf.nn.layer import BATCH_NORM_EPSILON, Structure
from bpf.nn.losses import squash_for
from bpf.nn.network import Network
from bpf.registry import ALGORITHMS, Registry
from bpf.spec.run import RunSpec


class Stage(nn.Module):
    """What `torch.fx.symbolic_trace` makes a graph of: the operations of training for one run alone."""


class Pixels(Stage):
    """[N, C, H, W] in 0..255 -> [N, pixels] as `Feed.batch` scales them. Only images of `shape` are taken."""

    def __init__(
        self, scale: tuple[Tensor | float, Tensor | float], dtype: torch.dtype, shape: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.offset, self.factor = (nn.Buffer(end) if isinstance(end, Tensor) else end for end in scale)
        self.dtype, self.shape = dtype, shape
        self.wanted = f"This network takes images of shape [N, C, H, W] = [N, {', '.join(map(str, shape))}]."

    def forward(self, images: Tensor) -> Tensor:
        torch._assert(images.shape[1:] == self.shape, self.wanted)
        return images.flatten(1).to(self.dtype).sub(self.offset).mul(self.factor)


class Linear(Stage):
    """[N, in] -> [N, out] by the batched kernels of `Layer.forward`; weight [out, in], bias [1, out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, inputs: Tensor) -> Tensor:
        rows, weight = inputs.unsqueeze(0), self.weight.unsqueeze(0).transpose(1, 2)
        a = torch.bmm(rows, weight) if self.bias is None else torch.baddbmm(self.bias.unsqueeze(0), rows, weight)
        return a.squeeze(0)


class Norm(Stage):
    """[N, units] -> the same, by the running statistics and in the order of `Layer.forward`; all tensors [1, units].

    `deviation` is 1/√(variance + ε): a graph keeps it and not the variance, which no input depends on, anyway.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(scale), nn.Parameter(shift)
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", (variance + BATCH_NORM_EPSILON).rsqrt())

    def forward(self, a: Tensor) -> Tensor:
        return torch.addcmul(self.shift, a.sub(self.mean).mul(self.deviation), self.scale)


class Prediction(nn.Module):
    """[N, pixels] -> [N, targets] by the rule's own `logits`, on a network of one run."""

    def __init__(self, spec: RunSpec, shape: tuple[int, int, int], classes: int, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        try:
            kind = load_rules([spec.algorithm])[spec.algorithm]
        except UsageError as error:
            raise UsageError(
                f"A model of {spec.algorithm} predicts by this rule, so install what it was made with. {error}"
            ) from error
        inputs = math.prod(shape)
        targets = inputs if spec.problem_type == "reconstruction" else classes
        self._structure = Structure(inputs, spec.widths, targets, spec.activation, spec.batch_norm, spec.use_bias)
        self._names = {f"tensor_{number}": name for number, name in enumerate(tensors)}
        for attribute, name in self._names.items():
            self.register_buffer(attribute, tensors[name][None])
        try:
            problem = Problem(spec.problem_type, squash_for(spec.problem_type, spec.scaler))
            check_run(spec, kind)
            self._rule = kind(kind.Options.model_validate(spec.rule_options()), problem)
            with torch.no_grad():
                tried = self.forward(torch.zeros(2, inputs, dtype=tensors["weight.0"].dtype))
            if tried.shape != (2, targets):
                raise ValueError(f"logits gives {list(tried.shape)} for two images, and must give {[2, targets]}")
        except (Exception, SystemExit) as error:
            said = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
            reason = f"it cannot use a model of it, which another version may have made: {said}"
            raise Registry(ALGORITHMS).refusal(spec.algorithm, reason) from error

    def forward(self, pixels: Tensor) -> Tensor:
        tensors = {name: getattr(self, attribute) for attribute, name in self._names.items()}
        network = Network(self._structure, tensors, tensors)
        return self._rule.logits(network, pixels[None])[0]

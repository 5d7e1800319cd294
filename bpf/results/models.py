"""The best network of each learning rule, on disk: safetensors with the spec of its run; and as a plain torch module.

A file holds tensors and text only, so reading one runs nothing. Its `digest` covers both: it finds damage and careless
changes; whoever wants to deceive can compute a new one.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Never

import torch
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from bpf.algorithms import Algorithm
from bpf.data.scaling import scaling
from bpf.errors import UsageError
from bpf.experiment.places import model_path, unexpanded
from bpf.files import check_output, is_dir, is_file, write_atomically
from bpf.nn.activations import LEAKY_SLOPE
from bpf.nn.network import OWN_NAME
from bpf.results.stages import Linear, Norm, Pixels, Prediction, Stage
from bpf.spec.run import RunSpec

FORMAT = "bpf-model-1"
_TOLD = ("spec", "shape", "classes")
_LISTED = 10
"""So many models of a directory are named."""
_ONNX = re.compile(rb"\x08.{1,2}\x12.pytorch.*\n\x04spec\x12", re.DOTALL)
"""How an ONNX file is known: torch has made it, and the spec is in its metadata."""
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "relu": nn.ReLU,
    "lrelu": partial(nn.LeakyReLU, LEAKY_SLOPE),
    "swish": nn.SiLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
}


class Own(BaseModel):
    """What a rule has added to a network: its tensors, by name with their shapes, and whether it predicts by itself."""

    model_config = ConfigDict(extra="forbid", strict=True)
    tensors: dict[Annotated[str, StringConstraints(pattern=OWN_NAME)], Annotated[list[int], Field(max_length=8)]] = {}
    predicts: bool = False


def content(
    network: dict[str, Tensor],
    spec: RunSpec,
    shape: tuple[int, int, int],
    classes: Collection[str],
    rule: type[Algorithm] = Algorithm,
) -> bytes:
    """What a file holds of a network, as `Cohort.best_network` gives it: also its spec, and its images' shape (C, H, W)
    and classes.
    """
    told = {"spec": spec.model_dump_json(), "shape": json.dumps(shape), "classes": json.dumps(list(classes))}
    tensors = {name: tensor.contiguous() for name, tensor in network.items()}
    added = tensors.keys() - _expected(spec, shape, len(classes)).keys()
    own = Own(tensors={n: list(tensors[n].shape) for n in sorted(added)}, predicts=rule.logits is not Algorithm.logits)
    if own != Own():
        told["own"] = own.model_dump_json()
    return serialise(tensors, {"format": FORMAT, "digest": _digest(told, tensors), **told})


def save(path: Path, content: bytes) -> None:
    """Write the content of a model file."""
    write_atomically(path, lambda file: file.write(content))


def kept(directory: Path, rule: str) -> dict[str, Path]:
    """The networks of a rule that lie in an experiment's directory of models, by what would be the cells' keys."""
    return {path.stem: path for path in model_path(directory, rule, "").parent.glob("*.safetensors")}


def discard(path: Path) -> None:
    with suppress(OSError):  # of no more use, and no reason to fail
        path.unlink(missing_ok=True)


@dataclass(frozen=True, eq=False)
class Model:
    """What a file holds, checked: the tensors are those that the spec, the images' shape and the classes ask for.

    `tensors` are named as in `Network.state()`: weights [out, in], all others [1, units].
    """

    path: Path
    spec: RunSpec
    shape: tuple[int, int, int]
    classes: list[str]
    tensors: dict[str, Tensor]
    own: Own
    digest: str

    def module(self) -> nn.Sequential:
        """The network as `load` gives it."""
        dtype = self.tensors["weight.0"].dtype
        stages: dict[str, nn.Module] = {
            "pixels": Pixels(scaling(self.spec.scaler, self.shape, dtype), dtype, self.shape)
        }
        last = len(self.spec.widths)
        if self.own.predicts:
            stages["prediction"] = Prediction(self.spec, self.shape, len(self.classes), self.tensors)
        for k in range(0 if self.own.predicts else last + 1):
            kinds = ("weight", "bias", "scale", "shift", "mean", "variance")
            own = {kind: self.tensors[f"{kind}.{k}"] for kind in kinds if f"{kind}.{k}" in self.tensors}
            stages[f"linear_{k}"] = Linear(own["weight"], own.get("bias"))
            if "scale" in own:
                stages[f"norm_{k}"] = Norm(own["scale"], own["shift"], own["mean"], own["variance"])
            if k < last:
                stages[f"{self.spec.activation}_{k}"] = _ACTIVATIONS[self.spec.activation]()
        module = nn.Sequential()
        for name, stage in stages.items():
            # A traced stage is a graph of torch's functions and belongs to no class of ours.
            module.add_module(name, torch.fx.symbolic_trace(stage) if isinstance(stage, Stage) else stage)
        told = {"spec": self.spec.model_dump(mode="json"), "classes": list(self.classes), "shape": self.shape}
        for name, value in told.items():
            setattr(module, name, value)
        return module.eval()


def load(path: str | Path) -> nn.Sequential:
    """The network as a module of plain torch, on the CPU and in eval mode.

    Takes images [N, C, H, W], uint8 or floating point, in 0..255, and gives logits [N, targets]; images of another
    shape are an AssertionError, which is what torch's graphs can raise, wherever they run. It has the attributes
    `spec` (a dict, all fields of the execution's spec), `classes` (their names in the order of the logits; of the data
    set's labels in reconstruction) and `shape` (C, H, W).

    The stages are activation modules of torch, and graphs of torch functions (`torch.fx.GraphModule`) with the
    parameters and running statistics; what `torch.save` or `torch.export` makes of them needs no bpf to load and run.
    Graphs and not `nn.Linear` and `nn.BatchNorm1d`, because those round differently: these apply the very kernels of
    training, so on one thread of the same kind of processor equal batches give equal bits. (In layers of one unit,
    those of an execution trained alone: a product with one vector is rounded differently from a stack of them.)
    A rule that predicts by itself is called by its module, and must be installed.

    Raises UsageError, having run nothing from the file, for one that is missing, damaged, changed or not of bpf.
    """
    return read(path).module()


def info(path: str | Path) -> dict[str, Any]:
    """What a file says of itself, as plain values, after the same checks as in `load`."""
    model = read(path)
    return {
        "path": str(path),
        "format": FORMAT,
        "algorithm": model.spec.algorithm,
        "dataset": model.spec.dataset,
        "problem_type": model.spec.problem_type,
        "shape": list(model.shape),
        "classes": list(model.classes),
        "parameters": sum(t.numel() for n, t in model.tensors.items() if not n.startswith(("mean.", "variance."))),
        "digest": model.digest,
        "spec": model.spec.model_dump(mode="json"),
    }


def read(path: str | Path) -> Model:
    """The checked content of a file; raises UsageError as `load` does.

    Values need not be finite: batch norm's running variance may overflow in a network that works.
    """
    path = Path(path)
    told, tensors = _content(path)
    missing = [name for name in ("digest", *_TOLD) if name not in told]
    if told.get("format") != FORMAT:
        _refuse(path, f"its format is {told.get('format')!r}, and not {FORMAT!r}")
    if missing:
        _refuse(path, f"it lacks {', '.join(missing)}")
    if told["digest"] != _digest({name: told[name] for name in (*_TOLD, "own") if name in told}, tensors):
        _refuse(path, "its content does not agree with its digest, so it was damaged or changed")
    try:
        spec = RunSpec.model_validate_json(told["spec"])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        at = ".".join(map(str, first["loc"]))
        _refuse(path, f"this version of bpf cannot use its spec: {at + ': ' if at else ''}{first['msg']}")
    try:
        shape = TypeAdapter(tuple[int, int, int]).validate_json(told["shape"], strict=True)
        classes = TypeAdapter(list[str]).validate_json(told["classes"], strict=True)
    except ValidationError:
        _refuse(path, "its shape or its classes are malformed")
    try:
        own = Own.model_validate_json(told.get("own", "{}"))
    except ValidationError:
        _refuse(path, "what its rule has added is malformed")
    if min(shape) < 1 or not classes:
        _refuse(path, "its shape or its classes are malformed")
    if problem := _problem(tensors, own.tensors | _expected(spec, shape, len(classes))):
        _refuse(path, problem)
    return Model(path, spec, shape, classes, tensors, own, told["digest"])


def export_onnx(path: str | Path, output: str | Path) -> Path:
    """Write the network as ONNX: input `images` uint8 [N, C, H, W] with any N, output `logits` [N, targets].

    Spec, shape and classes go into the file's metadata, as JSON. The numbers are those of `load` to float32's rounding.
    Raises UsageError without the packages, for an unusable model and for a place that may not be written, such as that
    of a file which is no ONNX.
    """
    output = Path(output)
    check_output(output, "ONNX file of a model of bpf", _ONNX)
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError("Export to ONNX needs onnx and onnxscript: pip install 'bpf[onnx]'") from error
    model = read(path)
    images = torch.zeros(2, *model.shape, dtype=torch.uint8)
    try:
        program = torch.onnx.export(
            model.module(),
            (images,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("N")},),
            dynamo=True,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        if not model.own.predicts:
            raise
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UsageError(f"The prediction of the rule {model.spec.algorithm} cannot be ONNX: {reason}") from error
    assert program is not None
    program.model.metadata_props.update(
        spec=model.spec.model_dump_json(), shape=json.dumps(model.shape), classes=json.dumps(model.classes)
    )
    content = program.model_proto.SerializeToString()
    write_atomically(output, lambda file: file.write(content))
    return output


def _content(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The text and the tensors of a safetensors file, unchecked."""
    if is_dir(path) and (found := _below(path)):
        listed = "".join(f"\n  {model}" for model in found[:_LISTED])
        more = f"\n  and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        raise UsageError(f"{path} is a directory. Name one of its models:{listed}{more}")
    if not is_file(path):
        raise UsageError(
            f"There is no model {path}{unexpanded(path)}. Those of an experiment lie in its directory, in models/RULE/."
        )
    try:
        with safe_open(path, framework="pt") as file:
            # as copies: where they lie in the file is not aligned, and kernels round differently there
            return file.metadata() or {}, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        _refuse(path, "it is damaged or no safetensors file")
    except OSError as error:
        raise UsageError(f"The model {path} cannot be read: {error.strerror or error}.") from error


def _below(directory: Path) -> list[Path]:
    """The models in the directory of an experiment, of its models, or of those of a rule."""
    patterns = ("models/*/*.safetensors", "*/*.safetensors", "*.safetensors")
    return sorted(path for pattern in patterns for path in directory.glob(pattern))


def _refuse(path: Path, reason: str) -> Never:
    raise UsageError(f"{path} is no usable model: {reason}.") from None


def _expected(spec: RunSpec, shape: tuple[int, int, int], classes: int) -> dict[str, list[int]]:
    """The shape of each tensor of a network."""
    inputs = shape[0] * shape[1] * shape[2]
    targets = inputs if spec.problem_type == "reconstruction" else classes
    expected = {}
    for k, (fan_in, fan_out) in enumerate(itertools.pairwise((inputs, *spec.widths, targets))):
        expected[f"weight.{k}"] = [fan_out, fan_in]
        rows = ["bias"] if spec.use_bias else []
        if spec.batch_norm and k < len(spec.widths):
            rows += ["scale", "shift", "mean", "variance"]
        expected |= {f"{row}.{k}": [1, fan_out] for row in rows}
    return expected


def _problem(tensors: Mapping[str, Tensor], expected: Mapping[str, list[int]]) -> str:
    """Why the tensors are not those that are expected, or nothing."""
    if missing := sorted(expected.keys() - tensors.keys()):
        return f"it lacks the tensors {', '.join(missing)} that its spec asks for"
    if surplus := sorted(tensors.keys() - expected.keys()):
        return f"its spec knows no tensors {', '.join(surplus)}"
    for name, shape in expected.items():
        if list(tensors[name].shape) != shape:
            return f"{name} is {list(tensors[name].shape)}, and its spec asks for {shape}"
    kinds = {tensor.dtype for tensor in tensors.values()}
    if kinds not in ({torch.float32}, {torch.float64}):
        return f"its tensors are {', '.join(sorted(str(kind) for kind in kinds))}, and not all float32 or all float64"
    return ""


def _digest(told: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, hexadecimal, over what a file says and over each tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps([FORMAT, dict(told)], sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

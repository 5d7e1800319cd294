"""Saved models in use: their scores on a data set, and what they make of image files."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bpf.data.base import Images
from bpf.data.cache import Data, load, open_dataset
from bpf.data.images import EXTENSIONS, decode
from bpf.data.scaling import scaling
from bpf.errors import BpfError, UsageError, did_you_mean
from bpf.experiment.file import read as read_experiment
from bpf.experiment.grid import as_grid, expand
from bpf.experiment.places import unexpanded
from bpf.experiment.plugins import load_rules
from bpf.files import check_place, is_dir, is_file, write_atomically
from bpf.nn.losses import output_loss, squash_for
from bpf.nn.losses import predict as squashed
from bpf.results.models import Model, read
from bpf.spec.grid import TUNABLE
from bpf.spec.run import RunSpec
from bpf.training.feed import Feed
from bpf.training.steps import EVALUATION_ROWS

PARTS = ("test", "val", "train")
_ALL = {"examples_frac": 1.0, "val_frac": 0.0, "skew_type": "none", "imbalance_factor": None}
_LUMA = np.array([19595, 38470, 7471], dtype=np.uint32)


def evaluate(
    path: str | Path,
    dataset: str | None = None,
    data_dir: Path | None = None,
    part: str = "test",
    image_size: int | None = None,
) -> dict[str, Any]:
    """Scores of a saved model on a part of a data set, by default of its own; computed on the CPU.

    Data sets lie in `data_dir`, or else where those of the experiment do that the model lies in, or in `data`.

    `test` is the whole test set; `train` and `val` are the examples that an execution with the model's spec trains on
    and holds out, as they are: without augmentation. Images of `dataset` are scaled to the model's where the data set
    allows it, or to `image_size`, in pixels.

    Returns what the model is: the `algorithm` and the `params` of its cell, and the `seed` of the execution that it is
    of; and `loss`, the mean per example, `error`, the fraction of wrong predictions, and `confusion`, how many examples
    of each true class (rows) are taken for each class (columns); the latter two are None in reconstruction. `loss` is
    None if it is not finite. Batches, kernels and sums are those of training: an execution on a CPU of the same kind
    had the same test loss, bit for bit (but for layers of one unit, see `models.load`); one on a GPU to rounding.

    Raises UsageError for an unusable model, for data that do not fit it, and for a part that does not exist.
    """
    if part not in PARTS:
        raise UsageError(f"There is no part {part!r}.{did_you_mean(part, PARTS)}")
    model = read(path)
    name = dataset or model.spec.dataset
    if part == "val" and model.spec.val_frac == 0:
        raise UsageError(f"{path} was trained without a validation split (val_frac 0). Evaluate test or train.")
    data = _load(model, name, data_dir, image_size)
    _check_data(model, data)
    spec = model.spec
    known = {"model": str(path), "algorithm": spec.algorithm, "params": _params(spec), "seed": spec.seed}
    with _as_in_training():
        return {**known, "dataset": name, "part": part, **_scores(model, data, part)}


def _experiment_of(path: Path) -> tuple[Path, Path] | None:
    """The directory of the experiment that a model lies in, as models/RULE/KEY.safetensors, and where its data lie."""
    for model in (path.absolute(), path.resolve()):
        directory = model.parents[2] if len(model.parents) > 2 else model.parent
        if model.parent.parent.name == "models" and (directory / "experiment.yaml").is_file():
            with suppress(BpfError):  # the model may be used though its experiment cannot be read
                return directory, Path(read_experiment(directory / "experiment.yaml").data_dir)
    return None


def _load(model: Model, name: str, data_dir: Path | None, image_size: int | None) -> Data:
    """The data set, from `data_dir` or from where the experiment that the model lies in has its data."""
    own = _experiment_of(model.path) if data_dir is None else None
    place = data_dir or (own[1] if own is not None and own[1].is_dir() else Path("data"))
    try:
        return load(name, place, image_size or _size(model, name, place))
    except UsageError as error:
        if own is None:
            raise
        where = f"The data of the experiment {own[0]}, which the model lies in, are in {own[1]}"
        missing = "" if own[1].is_dir() else ", which is not there"
        raise UsageError(f"{error}\n{where}{missing}. Name another directory with --data-dir.") from error


def _params(spec: RunSpec) -> dict[str, Any]:
    """The parameters of the cell that a run is an execution of; all that are tunable if its rule is not installed."""
    try:
        return dict(expand(as_grid(spec), load_rules([spec.algorithm])).cells[0].params)
    except BpfError:
        return {name: value for name in TUNABLE if (value := getattr(spec, name)) not in (None, spec.algorithm)}


def predict(
    path: str | Path,
    images: Sequence[str | Path],
    top: int = 1,
    output: str | Path | None = None,
    tell: Callable[[str], object] = lambda line: None,
) -> list[dict[str, str | int | float]]:
    """What a saved model makes of image files and of those in directories, at any depth.

    Images are converted as in `folder:PATH`, scaled to the model's height and width, and made grey or coloured as it
    needs them. Each dict says whether its image was `converted`, and if any was, `tell` is told how, in one line.

    A classifier gives the `top` most likely classes of each image, each a dict with `file`, `rank` from 1, `class` and
    `probability` (the softmax); with output loss bce or mse `score` instead, the sigmoid of the class's own logit in
    (0, 1): these do not sum to 1.

    A model that reconstructs writes its image of each file as PNG into the directory `output`, and gives `file` and
    `output`. A name that occurs twice gets a number.

    Raises UsageError for an unusable model, for images that are missing or cannot be read, for a `top` below 1, for
    `output` where it is missing, has no use or belongs to an experiment, and for files in it that would be overwritten.
    """
    model = read(path)
    output = None if output is None else Path(output)
    reconstructs = model.spec.problem_type == "reconstruction"
    if reconstructs and output is None:
        raise UsageError(f"{path} reconstructs images; name a directory for them with --output.")
    if not reconstructs and output is not None:
        raise UsageError(f"{path} classifies images and writes none; leave out --output.")
    if top < 1:
        raise UsageError(f"top is {top}; it must be at least 1.")
    if output is not None:
        check_place(output)
    files = _files([Path(image) for image in images])
    targets = _targets(files, output) if output is not None else []
    pixels = torch.from_numpy(_fitting(files, model.shape))
    shapes = [_shape(file) for file in files]
    converted = [shape != model.shape for shape in shapes]
    if any(converted):
        others = _listed(list(dict.fromkeys(_shown(shape) for shape in shapes if shape != model.shape)))
        tell(
            f"{sum(converted)} of {len(files)} images were converted to the model's {_shown(model.shape)} "
            f"(channels x height x width), from {others}"
        )
    module = model.module()
    with _as_in_training():
        logits = torch.cat([module(batch) for batch in torch.split(pixels, EVALUATION_ROWS)])
    if reconstructs:
        for target, image in zip(targets, _pixels(model, logits), strict=True):
            _write_png(target, image)
        return [
            {"file": str(file), "output": str(target), "converted": changed}
            for file, target, changed in zip(files, targets, converted, strict=True)
        ]
    word, scores = (
        ("probability", logits.softmax(-1)) if model.spec.resolved_loss == "ce" else ("score", logits.sigmoid())
    )
    best = scores.topk(min(top, len(model.classes)))
    return [
        {"file": str(file), "rank": rank, "class": model.classes[index], word: value, "converted": changed}
        for file, changed, indices, values in zip(
            files, converted, best.indices.tolist(), best.values.tolist(), strict=True
        )
        for rank, (index, value) in enumerate(zip(indices, values, strict=True), 1)
    ]


@contextmanager
def _as_in_training() -> Iterator[None]:
    """Compute as workers do (`hardware.settle`), for equal bits, and leave the process as it was."""
    threads = torch.get_num_threads()
    flushed = bool(torch.tensor(1e-40).mul(1) == 0)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flushed)


def _size(model: Model, name: str, data_dir: Path) -> int | None:
    """The image size to load a data set with: the run's on its own set, the model's on others that can be scaled."""
    if name == model.spec.dataset:
        return model.spec.image_size
    _, height, width = model.shape
    return height if height == width and open_dataset(name, data_dir).resizable else None


def _check_data(model: Model, data: Data) -> None:
    if data.shape != model.shape:
        raise UsageError(
            f"The images of {data.name} are {_shown(data.shape)} (channels x height x width), and {model.path} takes "
            f"{_shown(model.shape)}. Evaluate it on such images."
        )
    if model.spec.problem_type == "reconstruction":
        return
    if len(data.classes) != len(model.classes):
        raise UsageError(
            f"{data.name} has {len(data.classes)} classes, and {model.path} tells {len(model.classes)} apart. Evaluate "
            "it on a data set with the same classes."
        )
    if list(data.classes) != model.classes and set(data.classes) == set(model.classes):
        raise UsageError(
            f"{data.name} has the classes of {model.path} in another order: {_listed(data.classes)}, and not "
            f"{_listed(model.classes)}. Number them alike."
        )


def _scores(model: Model, data: Data, part: str) -> dict[str, Any]:
    """As `Evaluation` in training, by the saved model's own module."""
    spec = model.spec if part != "test" else model.spec.model_copy(update=_ALL)  # no subset that could be impossible
    feed = Feed(data, spec, torch.device("cpu"), model.tensors["weight.0"].dtype)
    examples = {"test": feed.test, "val": feed.val, "train": feed.train}[part]
    loss = output_loss(spec.resolved_loss, squash_for(spec.problem_type, spec.scaler))
    module, classes = model.module(), len(model.classes)
    total = torch.zeros((), dtype=model.tensors["weight.0"].dtype)
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    for rows in torch.split(examples.index, EVALUATION_ROWS):
        _, target, labels = feed.batch(examples, rows[None])
        logits = module(examples.images[rows].view(-1, *model.shape))
        total += loss(logits[None], target)[0].sum()
        if feed.classifies:
            pairs = labels[0] * classes + logits.argmax(-1)
            confusion += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    mean = total.div_(len(examples)).item()
    wrong = int(confusion.sum() - confusion.trace())
    return {
        "examples": len(examples),
        "loss": mean if math.isfinite(mean) else None,
        "error": wrong / len(examples) if feed.classifies else None,
        "classes": list(model.classes),
        "confusion": confusion.tolist() if feed.classifies else None,
    }


def _files(images: Sequence[Path]) -> list[Path]:
    """The files named, and the image files below directories; each directory's sorted."""
    files: list[Path] = []
    for path in images:
        if is_dir(path):
            below = [file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS and is_file(file)]
            hidden = [file for file in below if any(part.startswith(".") for part in file.relative_to(path).parts)]
            found = sorted(set(below) - set(hidden))
            if not found:
                raise UsageError(f"{path} has no images. Recognised are {' '.join(sorted(EXTENSIONS))}.")
            files += found
        elif is_file(path):
            files.append(path)
        else:
            raise UsageError(f"There is no image {path}{unexpanded(path)}.")
    if not files:
        raise UsageError("Name at least one image, or a directory of images.")
    return files


def _targets(files: Sequence[Path], output: Path) -> list[Path]:
    """Where the image of each file goes, under its own name if that is free."""
    targets: dict[Path, None] = {}
    for file in files:
        target, number = output / f"{file.stem}.png", 1
        while target in targets:
            number += 1
            target = output / f"{file.stem}-{number}.png"
        if target.exists():
            raise UsageError(f"{target} exists already. Choose another directory.")
        targets[target] = None
    return list(targets)


def _fitting(files: Sequence[Path], shape: tuple[int, int, int]) -> Images:
    """The files' pixels, uint8 [N, *shape]."""
    channels, height, width = shape
    pixels = decode("your selection", [str(file) for file in files], (height, width), keep_grey=channels == 1)
    if len(pixels[0]) == channels:
        return pixels
    if channels == 1:
        # ITU-R BT.601 in the whole numbers that PIL uses too, which leave what is grey already as it is
        grey = (np.tensordot(pixels.astype(np.uint32), _LUMA, (1, 0)) + 0x8000) >> 16
        return grey.astype(np.uint8)[:, None]
    raise UsageError(f"The model takes images with {channels} channels; image files have 1 or 3.")


def _shape(file: Path) -> tuple[int, int, int]:
    """Channels, height and width of an image file that can be read."""
    from PIL import Image

    with Image.open(file) as image:
        return 1 if Image.getmodebase(image.mode) == "L" else 3, image.height, image.width


def _pixels(model: Model, logits: Tensor) -> Images:
    """Reconstructions as images, uint8 [N, C, H, W]: the output, squashed and scaled back."""
    offset, factor = scaling(model.spec.scaler, model.shape, logits.dtype)
    output = squashed(logits, squash_for(model.spec.problem_type, model.spec.scaler)) / factor + offset
    images: Images = output.round().clamp(0, 255).nan_to_num().byte().view(-1, *model.shape).numpy()
    return images


def _write_png(path: Path, image: Images) -> None:
    from PIL import Image

    picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
    write_atomically(path, lambda file: picture.save(file, "PNG"))


def _shown(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _listed(words: Sequence[str]) -> str:
    return ", ".join([*words[:5], *(["..."] if len(words) > 5 else [])])

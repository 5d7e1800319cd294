"""Commands that use a saved model: `evaluate`, `predict`, `onnx`."""

from pathlib import Path
from typing import Annotated

import typer

from bpf.cli.arguments import AsJson, number_for, print_json
from bpf.console.screen import say, tell

Model = Annotated[Path, typer.Argument(help="A saved model, such as RUN/models/dfa/KEY.safetensors.", metavar="MODEL")]


def evaluate(
    model: Model,
    dataset: Annotated[
        str | None,
        typer.Option(help="The data set; by default the one it was trained on.", metavar="NAME", show_default=False),
    ] = None,
    part: Annotated[str, typer.Option(help="Of the data set.", metavar="test|val|train")] = "test",
    data_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="BPF_DATA_DIR",
            help="Where data sets live; by default where those of the model's experiment do, or data.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            help="Side of the images of folder:PATH; by default that of the model.", metavar="N", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Loss, error and confusion matrix of a saved model: the network of one of a cell's executions."""
    from bpf.console import tables
    from bpf.results.evaluation import evaluate

    scores = evaluate(model, dataset, data_dir, part, image_size)
    print_json(scores) if as_json else tables.show_scores(scores)


def predict(
    model: Model,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.", metavar="IMAGES...")],
    top: Annotated[
        int, typer.Option(parser=number_for("--top", int, 1), help="How many classes of each image.", metavar="N")
    ] = 1,
    output: Annotated[
        Path | None,
        typer.Option(help="A folder for reconstructed images.", metavar="DIR", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What a saved model makes of images.

    Images of another size are scaled to the model's, keeping their proportions, on black; coloured ones become grey
    for a model of grey images, and grey ones coloured for one of coloured images.
    """
    from bpf.console import tables
    from bpf.results.evaluation import predict

    found = predict(model, images, top, output, tell)
    print_json(found) if as_json else tables.show_predictions(found)


def onnx(model: Model, output: Annotated[Path, typer.Argument(help="The ONNX file to write.", metavar="FILE")]) -> None:
    """Write a saved model as ONNX: images uint8 [N, C, H, W] in, `logits` out.

    A classifier gives one for each class. A network that reconstructs gives one for each pixel, [N, CxHxW]: its tanh
    with scaler standard, its sigmoid with zero_one, and itself with identity, is the pixel as that scaler has it.
    """
    from bpf.results.models import export_onnx

    say(str(export_onnx(model, output)))


COMMANDS = (evaluate, predict, onnx)

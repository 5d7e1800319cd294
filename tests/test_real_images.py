"""Real images through the public door. Needs the original files of Fashion-MNIST, where BPF_TEST_FASHION_MNIST says."""

import json
import os
import shutil
from pathlib import Path

import pytest

from bpf import cli

SOURCE = os.environ.get("BPF_TEST_FASHION_MNIST")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    raw = directory / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in Path(SOURCE or "").glob("*.gz"):
        shutil.copy(file, raw)
    return directory


@pytest.mark.skipif(SOURCE is None, reason="BPF_TEST_FASHION_MNIST does not say where the original files are")
@pytest.mark.parametrize(("rule", "most"), [("bp", 0.15), ("dfa", 0.15), ("ll-cce", 0.15), ("drtp", 0.20)])
def test_fashion_mnist_after_five_epochs(
    rule: str, most: float, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(
            [
                *("train", str(tmp_path / rule), "--dataset", "fmnist", "--data-dir", str(data_dir)),
                *("--algorithm", rule, "--arch", "500-500", "--activation", "tanh", "--epochs", "5"),
                *("--examples-frac", "1", "--lr", "0.0003", "--json"),
            ]
        )
    report = json.loads(capsys.readouterr().out)
    assert end.value.code == 0
    assert report["status"] == "complete"
    assert report["test"]["error"] < most

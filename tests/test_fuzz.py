"""Whatever bpf is given, it ends in words, and what is not its own stays as it is: `make fuzz` draws 3,000 cases."""

import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fuzzing
from bpf.training import checkpoint
from remembering import stop_after_an_epoch

pytestmark = pytest.mark.usefixtures("in_this_process")

CASES = int(os.environ.get("BPF_FUZZ_CASES", "225"))
SEED = int(os.environ.get("BPF_FUZZ_SEED", "1"))
FLIPS = 1000 if CASES > 1000 else 200


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, in_this_process: None) -> Iterator[fuzzing.Made]:
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("BPF_DEBUG", "BPF_DATA_DIR", "BPF_CACHE_DIR", "BPF_STORAGE", "CI"):
            patch.delenv(name, raising=False)
        patch.setenv("COLUMNS", "100")
        patch.setattr(signal, "default_int_handler", signal.default_int_handler)
        made = fuzzing.make(root)
        stop_after_an_epoch(root / "half")
        yield made


@pytest.mark.parametrize("family", fuzzing.FAMILIES)
def test_what_lies_is_told_in_words(made: fuzzing.Made, tmp_path: Path, family: str) -> None:
    found = []
    for number in range(-(-CASES // len(fuzzing.FAMILIES))):
        work = tmp_path / f"{number}"
        work.mkdir()
        draw = random.Random(f"{SEED}/{family}/{number}")
        case = fuzzing.FAMILIES[family](draw, work, made)
        found += [f"case {number}: {problem}" for problem in fuzzing.problems(case, work)]
        shutil.rmtree(work, ignore_errors=True)
    assert not found, "\n".join([f"{len(found)} problems, of which the first:", *found[:20]])


def test_flipped_bits_of_checkpoints_are_never_believed(made: fuzzing.Made, tmp_path: Path) -> None:
    """Anywhere in a file, in this format and in that of bpf 0.2."""
    half = next((made.root / "half/checkpoints").iterdir())
    draw, believed = random.Random(SEED), []
    for older in (False, True):
        path = tmp_path / half.name
        shutil.copy(half, path)
        if older:
            torch.save(checkpoint.load(path, path.stem) | {"format": 2, "cohort": path.stem}, path)
        whole, truth = path.read_bytes(), checkpoint.load(path, path.stem)
        for _ in range(FLIPS // 2):
            content, at = bytearray(whole), draw.randrange(8 * len(whole))
            content[at // 8] ^= 1 << at % 8
            path.write_bytes(content)
            try:
                found = checkpoint.load(path, path.stem)
            except checkpoint.Unusable:
                continue
            # In the older one some bits say nothing, such as the date of a part.
            if not older or not same(found, truth):
                believed.append((older, at))
    assert believed == []


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)

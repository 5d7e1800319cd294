"""Random numbers by counter: equal bits wherever they are drawn; even, independent, and determined by their key."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from bpf.nn import philox
from bpf.nn.randomness import Clock, Draws, Dropout

CPU = torch.device("cpu")
KEYS = [philox.key(3, "dropout.0"), philox.key(4, "noise"), (2**64 - 1, 2**63 + 5)]


def at(epoch: int, step: int) -> Clock:
    clock = Clock(CPU)
    clock.begin(epoch)
    for _ in range(step):
        clock.tick()
    return clock


def draws(seeds, clock=None, dtype=torch.float32, on_host=True):
    found = Draws(seeds, clock or at(0, 0), dtype)
    found._on_host = on_host
    return found


def uniform(seed: int, purpose: str, epoch: int, step: int, count: int = 4096) -> np.ndarray:
    return draws([seed], at(epoch, step)).uniform(purpose, count)[0].numpy()


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1003])
@pytest.mark.parametrize(("epoch", "step"), [(0, 0), (2, 77), (299, 2**40)])
def test_torch_draws_the_bits_of_numpys_philox(count, epoch, step):
    ours = philox.words(philox.key_tensor(KEYS, CPU), torch.tensor([epoch, step]), count)
    for key, own in zip(KEYS, ours, strict=True):
        theirs = np.random.Philox(key=np.array(key, np.uint64), counter=[0, step, epoch, 0]).random_raw(-(-count // 2))
        assert own.numpy().tobytes() == theirs.astype("<u8").tobytes()[: 4 * count]
    assert torch.equal(ours, philox.HostStreams(KEYS).words(epoch, step, count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_they_are_drawn_makes_no_difference(dtype):
    seeds, clock = [5, 2, 5, 9], at(3, 4)
    host, device = draws(seeds, clock, dtype), draws(seeds, clock, dtype, on_host=False)
    assert torch.equal(host.uniform("noise", 3, 11), device.uniform("noise", 3, 11))
    thresholds = torch.tensor([-(2**31), 0, 2**30, 2**31 - 1], dtype=torch.int32)
    scales = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=dtype)
    kept = host.kept("dropout.1", (5, 7), thresholds, scales)
    assert kept.dtype == dtype
    assert torch.equal(kept, device.kept("dropout.1", (5, 7), thresholds, scales))


def test_a_stream_is_that_of_its_seed_whatever_is_stacked():
    together, alone = draws([5, 2, 5]).uniform("noise", 20), draws([2]).uniform("noise", 20)
    assert torch.equal(together[1], alone[0])
    assert torch.equal(together[0], together[2])
    assert torch.equal(draws([2], dtype=torch.float64).uniform("noise", 20), alone.double())


def test_the_key_is_seed_purpose_epoch_and_step():
    keys = [(0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1), (1, "0/a", 0, 0)]
    numbers = [uniform(*key).tobytes() for key in keys]
    assert numbers == [uniform(*key).tobytes() for key in keys]
    assert len(set(numbers)) == len(keys)


def test_numbers_are_even_and_neighbours_independent():
    """Chi-squared over 64 bins and over pairs of neighbours, and correlations at short distances; limits at 5 sigma."""
    numbers = uniform(7, "dropout.0", 3, 11, 2**18)
    assert 0 <= numbers.min() < 1e-4 < 1 - 1e-4 < numbers.max() < 1
    for cells in (
        np.bincount((numbers * 64).astype(int), minlength=64),
        np.bincount((numbers[::2] * 8).astype(int) * 8 + (numbers[1::2] * 8).astype(int), minlength=64),
    ):
        expected = cells.sum() / 64
        assert abs(((cells - expected) ** 2 / expected).sum() - 63) < 5 * (2 * 63) ** 0.5
    centred = numbers - 0.5
    for distance in (1, 2, 4, 8, 500, 4096):
        correlation = (centred[distance:] * centred[:-distance]).mean() * 12
        assert abs(correlation) < 5 / len(centred) ** 0.5, distance


def test_streams_of_other_keys_are_independent():
    keys = [
        *((seed, "dropout.0", 0, 0) for seed in range(6)),
        *((0, f"dropout.{layer}", 0, 0) for layer in range(1, 6)),
        *((0, "dropout.0", epoch, 0) for epoch in range(1, 6)),
        *((0, "dropout.0", 0, step) for step in range(1, 6)),
    ]
    numbers = np.stack([uniform(*key) for key in keys]) - 0.5
    for one, other in itertools.combinations(range(len(keys)), 2):
        correlation = (numbers[one] * numbers[other]).mean() * 12
        assert abs(correlation) < 5.5 / numbers.shape[1] ** 0.5, (keys[one], keys[other])


@pytest.mark.parametrize("rate", [0.1, 0.5, 1 - 1e-12])
def test_dropout_rates_are_exact_to_a_few_parts_in_2_to_the_32(rate):
    dropout = Dropout([rate], draws([0], dtype=torch.float64), CPU, torch.float64)
    dropped = (int(dropout._thresholds) + 2**31) / 2**32
    assert dropped == pytest.approx(rate, abs=2**-32)
    assert dropout._scales.item() == 1 / (1 - rate)


INTERPRETED = """
import torch
from bpf.nn import kernels, philox

cpu, clock = torch.device("cpu"), torch.tensor([2, 77])
keys = philox.key_tensor([philox.key(3, "dropout.0"), philox.key(4, "noise"), (2**64 - 1, 2**63 + 5)], cpu)
for dtype in (torch.float32, torch.float64):
    for shape in ((7, 29), (8,), (1,)):
        count = torch.Size(shape).numel()
        words = philox.words(keys, clock, count).view(3, *shape)
        out = torch.full((3, *shape), 9.0, dtype=dtype)
        kernels.uniform(out, keys, clock)
        assert torch.equal(out, ((words >> 8) & (2**24 - 1)).to(dtype) * 2**-24)
        thresholds, scales = torch.tensor([-(2**31), 0, 2**30], dtype=torch.int32), torch.tensor([1, 2, 4], dtype=dtype)
        out.fill_(9.0)
        kernels.kept(out, keys, clock, thresholds, scales)
        ones = [1] * len(shape)
        assert torch.equal(out, (words >= thresholds.view(3, *ones)) * scales.view(3, *ones))
assert kernels.usable(cpu)
"""


def test_the_kernels_draw_the_same_bits():
    """By Triton's interpreter, on this processor."""
    pytest.importorskip("triton", reason="Triton is not on this system")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_the_kernels_compile_for_cuda():
    """To machine code of two generations of cards; that needs no card."""
    triton = pytest.importorskip("triton", reason="Triton is not on this system")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bpf.nn import kernels

    for capability, real in ((80, "*fp32"), (90, "*fp32"), (90, "*fp64")):
        tensors = dict.fromkeys(("p", "g", "m", "v", "b", "out", "scales", "rates", "decays", "constants"), real)
        types = tensors | {
            "keys": "*i64",
            "clock": "*i64",
            "thresholds": "*i32",
            "corrections": "*fp64",
            "count": "i32",
        }
        for kernel, constants in (
            (kernels._adam, {"DECOUPLED": False, "SIZE": 1024}),
            (kernels._adam, {"DECOUPLED": True, "SIZE": 1024}),
            (kernels._rmsprop, {"SIZE": 1024}),
            (kernels._sgd, {"REMEMBERS": True, "NESTEROV": True, "SIZE": 1024}),
            (kernels._sgd, {"REMEMBERS": False, "NESTEROV": False, "SIZE": 1024}),
            (kernels._kept, {"SIZE": 128}),
            (kernels._uniform, {"SIZE": 128}),
        ):
            signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]

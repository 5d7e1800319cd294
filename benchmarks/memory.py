"""How much memory a training step takes as the network gets deeper.

    python benchmarks/memory.py

Each figure is the growth of this process's peak resident memory during one step, above what parameters, gradients,
optimizer state and the batch itself hold (Linux, CPU, one network, 1000 units a layer, batch 8192: one layer's
activations are 31 MiB). Each is measured in a process of its own. Backpropagation and dfa keep every layer's
activations until the end of the forward pass; drtp, ll-cce and ll-mse let go of a layer's as soon as the next layer has
its inputs. The last table is the memory of the gradients themselves, which the layer-wise update shares between layers.
"""

import argparse
import subprocess
import sys
from pathlib import Path

DEPTHS = (2, 4, 8, 16, 32)
RULES = ("bp", "dfa", "drtp", "ll-cce", "ll-mse")
UNITS, BATCH = 1000, 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("RULE", "DEPTH"), help="measure one figure (used by itself)")
    one = parser.parse_args().one
    if one:
        print(step_memory(one[0], int(one[1])))
        return
    print("peak memory of a step in MiB, by number of hidden layers")
    print("rule    " + "".join(f"{depth:>8}" for depth in DEPTHS))
    for rule in RULES:
        figures = [int(run_one(rule, depth)) / 2**20 for depth in DEPTHS]
        print(f"{rule:<8}" + "".join(f"{figure:>8.0f}" for figure in figures))
    print("\nmemory of the gradients in MiB, by number of hidden layers")
    for name, shared in (("updated at the end", False), ("layer-wise", True)):
        print(f"{name:<20}" + "".join(f"{gradient_memory(depth, shared) / 2**20:>8.1f}" for depth in DEPTHS))


def run_one(rule: str, depth: int) -> str:
    command = [sys.executable, __file__, "--one", rule, str(depth)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def step_memory(rule_name: str, depth: int) -> int:
    import torch

    from bpf.algorithms import Problem, Step, cross_entropy
    from bpf.experiment.plugins import load_rules
    from bpf.nn.layer import Structure
    from bpf.nn.network import Network
    from bpf.training.hardware import settle

    settle(torch.device("cpu"))
    rule_class = load_rules([rule_name])[rule_name]
    feedback = ["lecun"] if rule_class.has_feedback else None
    network = Network.build(Structure(UNITS, (UNITS,) * depth, 10, init="torch"), [0], feedback)
    rule = rule_class(rule_class.Options(), Problem("classification", "sigmoid"))

    @torch.no_grad()
    def step(batch: int) -> int:
        inputs = torch.rand(1, batch, UNITS)
        target = torch.eye(10)[torch.arange(batch) % 10][None]
        before = reset_peak()
        rule.gradients(Step(network, inputs, target, cross_entropy))
        return status("VmHWM") - before

    step(8)
    return step(BATCH)


def gradient_memory(depth: int, shared: bool) -> int:
    from bpf.nn.layer import Structure
    from bpf.nn.network import Network

    network = Network.build(Structure(UNITS, (UNITS,) * depth, 10, init="zeros"), [0], None, shared_gradients=shared)
    memory = {gradient.untyped_storage().data_ptr(): gradient for gradient in network.gradients.values()}
    return sum(gradient.untyped_storage().nbytes() for gradient in memory.values())


def reset_peak() -> int:
    """Forget the peak so far; returns the resident memory now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


if __name__ == "__main__":
    main()

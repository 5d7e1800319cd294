"""The nodes of a cluster: what kinds there are, which of them a request asks for, and how many workers they take."""

from collections import Counter
from dataclasses import dataclass

from bpf.errors import UsageError
from bpf.words import counted


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, with so many processor cores and GPUs for Ray to give; `leaving` when it is drained."""

    id: str
    address: str
    cpus: int
    gpus: int
    port: int = 0
    leaving: bool = False

    @property
    def kind(self) -> str:
        return "cuda" if self.gpus else "cpu"

    def seats(self, kind: str, per_gpu: int) -> int:
        """How many workers it takes."""
        if kind == "cpu":
            return self.cpus
        return self.gpus * per_gpu


def kinds(device: str, nodes: list[Node]) -> list[str]:
    """The kinds of workers, cpu and cuda, that `device` (as in a spec) asks for on these nodes.

    Raises UsageError for devices that Ray does not place by number, for those that no node has, and for `auto` where
    some nodes have GPUs and others do not: the bits of both differ, so somebody has to want it.
    """
    useful = Counter(node.kind for node in nodes if node.cpus or node.gpus)
    found = f"{counted(useful['cuda'], 'node')} with GPUs and {counted(useful['cpu'], 'node')} without"
    if device == "auto":
        if len(useful) > 1:
            raise UsageError(
                f"The cluster has {found}, and numbers from GPUs and CPUs differ in their last bits. Choose with "
                "--device cuda, --device cpu, or --device cuda,cpu for both."
            )
        if not useful:
            raise UsageError(
                "The cluster has no node for workers yet. Say what to ask for: --device cuda or --device cpu, and "
                "--workers N."
            )
        return list(useful)
    asked = list(dict.fromkeys(device.split(",")))
    if not {"cpu", "cuda"}.issuperset(asked):
        raise UsageError(f"--device {device}: on a cluster Ray places the workers. Give auto, cpu, cuda, or cuda,cpu.")
    if "cuda" in asked and useful and not useful["cuda"]:
        raise UsageError(f"--device {device}: the cluster has {found}. Use --device cpu.")
    return asked

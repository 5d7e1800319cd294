"""The contract that every learning rule keeps, as a suite of tests for its author.

In a test module of the plugin, which must be installed:

    from bpf.testing import AlgorithmContract

    class TestMyRule(AlgorithmContract):
        name = "my-rule"

pytest then runs every check below. All of them train small stacked networks in double precision on the CPU, in
seconds.
"""

from bpf.testing.bench import Bench, Case
from bpf.testing.contract import AlgorithmContract

__all__ = ["AlgorithmContract", "Bench", "Case"]

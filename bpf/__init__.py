"""Train fully connected networks without backpropagation, and compare learning rules by grid search.

In Python: `bpf.tune(spec, directory)`, `bpf.train(spec, directory)`, `bpf.open(directory)` and `bpf.load(model)`.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = ["load", "open", "train", "tune"]

if TYPE_CHECKING:
    from bpf.notebook import open, train, tune
    from bpf.results.models import load


def __getattr__(name: str) -> Any:
    """The functions for Python, imported when they are asked for: `bpf --help` needs none of what they need."""
    if name not in __all__:
        raise AttributeError(f"module 'bpf' has no attribute {name!r}")
    if name == "load":
        from bpf.results.models import load

        return load
    from bpf.interrupts import NOTHING_BEGUN, interruptible, told_in_one_line

    with told_in_one_line(), interruptible(lambda: NOTHING_BEGUN):  # its imports take seconds
        from bpf import notebook

    return getattr(notebook, name)

"""Train fully connected networks without backpropagation, and compare learning rules by grid search."""

__version__ = "0.2.0"

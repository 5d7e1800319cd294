"""PEPITA, learning by two forward passes, for bpf."""

from bpf_pepita.pepita import Pepita

__all__ = ["Pepita"]

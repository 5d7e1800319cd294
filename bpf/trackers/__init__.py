"""Measurements on a fixed probe batch, and the names that a plugin needs to add one."""

from bpf.trackers.base import Probe, Tracker

__all__ = ["Probe", "Tracker"]

"""Learning rules, and the names that a plugin needs to add one."""

from bpf.algorithms.base import Algorithm, Options, Problem, ProjectionRule, Step
from bpf.nn.initialisers import random_feedback
from bpf.nn.layer import Layer, Structure, Trace
from bpf.nn.losses import binary_cross_entropy, cross_entropy, predict, squared_error
from bpf.nn.network import Network

__all__ = [
    "Algorithm",
    "Layer",
    "Network",
    "Options",
    "Problem",
    "ProjectionRule",
    "Step",
    "Structure",
    "Trace",
    "binary_cross_entropy",
    "cross_entropy",
    "predict",
    "random_feedback",
    "squared_error",
]

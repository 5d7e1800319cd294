"""Predictive coding and fixed-weight difference target propagation for bpf."""

"""Feedback alignment, sign-DFA and shallow learning for bpf."""

"""`python -m bpf` is the command `bpf`."""

from bpf.cli.app import main

main()

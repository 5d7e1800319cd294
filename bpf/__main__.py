"""`python -m bpf` is the command `bpf`."""

import signal

from bpf.interrupts import NOTHING_BEGUN, SIGNALS, interruptible


def main() -> None:
    """Run the command line; Ctrl-C is answered in one line from here on, also while it is imported."""
    with interruptible(lambda: NOTHING_BEGUN, at_once=True):
        from bpf.cli import app
    try:
        app.main()
    finally:  # it is over; what Python does to end must not end in a traceback
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    main()

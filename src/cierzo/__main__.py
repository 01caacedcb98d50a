"""`python -m cierzo` is the `cierzo` command."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Run the command. While it is imported and while the interpreter ends, Ctrl-C ends the process in silence; in
    between `cli.main` tells it. SIGHUP, on which a server reads its keys again, does nothing until it has read them
    for the first time."""
    if sys.argv[1:2] == ["serve"]:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    handler = signal.getsignal(signal.SIGINT)
    can_interrupt = handler is signal.default_int_handler  # else whoever started the process has ruled it out
    if can_interrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from cierzo import cli

    if can_interrupt:
        signal.signal(signal.SIGINT, handler)
    try:
        return cli.main()
    finally:
        if can_interrupt:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    raise SystemExit(main())

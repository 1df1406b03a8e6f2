"""The first process of a container: it starts the daemon, passes signals on to it, and reaps what is left to it.

A script of the standard library alone, as it is there beside every daemon. Does what tini does: a process whose
parent ended becomes the first one's child (credentials(7)), and stays a zombie until that waits for it; and a signal
that the first process does not handle is dropped by the kernel, so that SIGTERM would end nothing.
"""

from __future__ import annotations

import os
import signal
import sys

EXIT_USAGE = 2
EXIT_NOT_RUNNABLE = 126
EXIT_NOT_FOUND = 127
EXIT_SIGNALLED = 128
"""The status of a daemon that signal n ended is this and n, as shells say it."""

_OWN = frozenset(
    {
        *(signal.SIGKILL, signal.SIGSTOP),  # nobody can wait for these
        *(signal.SIGSEGV, signal.SIGILL, signal.SIGFPE, signal.SIGBUS, signal.SIGABRT, signal.SIGTRAP),
        *(signal.SIGTTIN, signal.SIGTTOU),  # about this process' own use of the terminal
    }
)
_PYTHONS = (signal.SIGPIPE, signal.SIGXFSZ)
"""Python ignores these, and what it starts would inherit that."""


def main(argv: list[str]) -> int:
    """Run the command to its end and return its exit status."""
    if not argv:
        print("init: expected a command, e.g. ztna-dnsd --config /etc/ztna/dnsd.yaml", file=sys.stderr)
        return EXIT_USAGE
    awaited = signal.valid_signals() - _OWN
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        child = os.posix_spawnp(argv[0], argv, os.environ, setpgroup=0, setsigmask=(), setsigdef=_PYTHONS)
    except OSError as error:
        print(f"init: {argv[0]}: {error.strerror}", file=sys.stderr)
        return EXIT_NOT_FOUND if isinstance(error, FileNotFoundError) else EXIT_NOT_RUNNABLE
    if os.isatty(0):
        os.tcsetpgrp(0, child)
    while True:
        number = signal.sigwaitinfo(awaited).si_signo
        if number != signal.SIGCHLD:
            os.kill(child, number)
        elif (status := _reap(child)) is not None:
            return status


def _reap(child: int) -> int | None:
    """Wait for all that has ended; return the child's exit status once it is among them."""
    ended = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            ended = code if code >= 0 else EXIT_SIGNALLED - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

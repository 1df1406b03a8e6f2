"""Commands that go on until they are ended."""

from __future__ import annotations

import signal

import pytest

from ztna.cli.ending import interruptible


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_either_signal_ends_also_who_was_started_with_it_ignored(number: signal.Signals) -> None:
    kept = signal.signal(number, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), interruptible():
            signal.raise_signal(number)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, kept)

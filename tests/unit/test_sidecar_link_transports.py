"""sidecar.link.transports: when TLS is tried beside QUIC, and QUIC again beside TLS."""

from __future__ import annotations

from sidecar.link.pulse import Life
from sidecar.link.transports import (
    HEAD_START_BLOCKED_SECONDS,
    HEAD_START_SECONDS,
    PROBE_SECONDS,
    PROBE_SECONDS_MAX,
    RESCUE_RETRY_SECONDS,
    STEADY_SECONDS,
    Transport,
    Transports,
)

QUIC, TLS = Transport.QUIC, Transport.TLS


def test_quic_has_a_long_start_until_it_was_blocked() -> None:
    ways = Transports()
    assert ways.head_start_s == HEAD_START_SECONDS
    ways.connected(TLS, 0.0)
    assert ways.head_start_s == HEAD_START_BLOCKED_SECONDS
    ways.connected(QUIC, 1.0)
    assert ways.head_start_s == HEAD_START_SECONDS


def test_tls_is_tried_while_quic_is_silent_and_not_without_pause() -> None:
    ways = Transports()
    ways.connected(QUIC, 0.0)
    assert ways.wanted(Life.UP, 5.0) is None
    assert ways.wanted(Life.SILENT, 5.0) is TLS
    ways.failed(5.0)
    assert ways.wanted(Life.SILENT, 5.0 + RESCUE_RETRY_SECONDS / 2) is None
    assert ways.wanted(Life.SILENT, 5.0 + RESCUE_RETRY_SECONDS) is TLS


def test_quic_is_probed_now_and_then_while_tls_carries() -> None:
    ways = Transports()
    ways.connected(TLS, 0.0)
    assert ways.wanted(Life.UP, PROBE_SECONDS - 0.1) is None
    assert ways.wanted(Life.SILENT, PROBE_SECONDS) is QUIC
    ways.failed(PROBE_SECONDS)
    assert ways.wanted(Life.UP, PROBE_SECONDS + 0.1) is None
    assert ways.wanted(Life.UP, 2 * PROBE_SECONDS) is QUIC


def test_quic_that_never_lasts_is_probed_ever_more_rarely() -> None:
    ways, now, pauses = Transports(), 0.0, list[float]()
    ways.connected(TLS, now)
    for _ in range(6):
        begun = now
        while ways.wanted(Life.UP, now) is None:
            now += 1.0
        pauses.append(now - begun)
        ways.connected(QUIC, now)
        ways.connected(TLS, now)
    assert pauses == [PROBE_SECONDS, 10.0, 20.0, 40.0, PROBE_SECONDS_MAX, PROBE_SECONDS_MAX]
    ways.connected(QUIC, now)
    ways.connected(TLS, now + STEADY_SECONDS)
    assert ways.wanted(Life.UP, now + STEADY_SECONDS + PROBE_SECONDS) is QUIC

"""The TCP flows of a connector beyond their bytes: limits, idle ones, the backend each is on, a line when one ends.

How many an agent may have and which one goes is sidecar.connector.ledger's to decide; moving bytes is
sidecar.link.flow's, and surviving carriers sidecar.link.served's.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from sidecar.connector.flow_log import Counts, Ended, FlowEnd, FlowLog
from sidecar.connector.fronting import Claim
from sidecar.connector.ledger import Key, Ledger
from sidecar.link.flow import TcpFlow, reset_reason
from sidecar.link.known import WasReset
from ztna.reasons import Reason
from ztna.sections import Endpoint
from ztna.telemetry import logger, refused

_WHERE = "connector"

_log = logger(__name__)


@dataclass(slots=True, eq=False)
class _Running:
    flow: TcpFlow
    claim: Claim
    began: float
    ended: Ended | None = None

    @property
    def key(self) -> Key:
        return self.flow.peer.name, self.flow.opened.flow


class TcpFlows:
    """Those that are being dialled and those that run; counted by the agent's proved name."""

    def __init__(self, *, per_agent: int, total: int, log: FlowLog) -> None:
        self._ledger: Ledger[_Running] = Ledger(_moved, per_agent=per_agent, total=total)
        self._flow_log = log
        self._loop = asyncio.get_running_loop()

    def __len__(self) -> int:
        return len(self._ledger)

    def admit(self, key: Key, idle_s: float) -> None:
        """Keep a place for a flow, at the cost of one that its agent does not use. Raises Refused(limit_reached)."""
        evicted = self._ledger.admit(key, idle_s, self._loop.time())
        if evicted is not None:
            refused(_WHERE, Reason.LIMIT_REACHED)
            _log.info("flow_evicted", agent=key[0], flow=evicted.key[1], reason=Reason.LIMIT_REACHED)
            self._reset(evicted, "evicted", Reason.LIMIT_REACHED)

    def given_up(self, key: Key) -> None:
        """Give the place back: no backend answered."""
        self._ledger.ended(key)

    def began(self, flow: TcpFlow, claim: Claim) -> None:
        """A backend answered, and the flow runs on it."""
        running = _Running(flow, claim, self._loop.time())
        self._ledger.began(running.key, running, running.began)
        flow.finished.add_done_callback(lambda _: self._finished(running))

    def tick(self) -> None:
        """Reset those that were idle for their time: to be called about once a second."""
        for running in self._ledger.idle(self._loop.time()):
            self._reset(running, "idle", Reason.PEER_GONE)

    def _reset(self, running: _Running, ended: Ended, reason: Reason) -> None:
        running.ended = ended
        running.flow.reset(reason)

    def _finished(self, running: _Running) -> None:
        self._ledger.ended(running.key)
        running.claim.release()
        flow, opened = running.flow, running.flow.opened
        ending = flow.ending
        code = ending.code if isinstance(ending, WasReset) else None
        self._flow_log.write(
            FlowEnd(
                protocol="tcp",
                agent=flow.peer.name,
                service=opened.service,
                session=flow.session,
                flow=opened.flow,
                source=str(Endpoint(opened.source.ip, opened.source.port)),
                destination=str(Endpoint(opened.destination.ip, opened.destination.port)),
                backend=str(running.claim.backend),
                seconds=self._loop.time() - running.began,
                counts=Counts(to_backend=flow.bytes_received, to_agent=flow.bytes_sent),
                ended=running.ended or ("finished" if code is None else "reset"),
                reason=None if code is None else reset_reason(code),
            )
        )


def _moved(running: _Running) -> int:
    return running.flow.bytes_sent + running.flow.bytes_received

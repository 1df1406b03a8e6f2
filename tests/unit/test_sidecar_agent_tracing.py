"""sidecar.agent.tracing: a real agent tries services out, against a scripted relay and connectors."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sidecar.agent.tracing import _connected_pair
from tests.support.small_mesh import agent, small_mesh
from tests.unit.test_sidecar_agent_daemon import TCP, UDP, echo_backend, is_listening, status, until
from ztna.errors import BadName, Refused
from ztna.reasons import Reason
from ztna.runtime import Daemon
from ztna.wire.stream import OpenStatus

OTHER = "other-service"


async def trace(daemon: Daemon, service: str = "echo-service") -> dict[str, dict[str, Any]]:
    steps: list[dict[str, Any]] = msgspec.to_builtins(await daemon.probes["trace"](service))
    return {step["step"]: step for step in steps}


async def test_every_step_of_a_service_that_works_and_nothing_is_left(tmp_path: Path) -> None:
    async with small_mesh(tmp_path) as mesh, echo_backend() as backend:
        connector = mesh.connector()
        connector.backend = backend
        ip = await mesh.lease("echo-service", 2, TCP, UDP)
        async with agent(mesh) as daemon:
            await until("listening", lambda: len(status(daemon)["services"]) == 1)
            steps = await trace(daemon)
            expected = [
                "grant",
                "lease",
                "relay",
                "session",
                "packet carrier",
                "backend tcp:8080",
                "backend udp:5300",
            ]
            assert list(steps) == expected
            assert [step["ok"] for step in steps.values()] == [True] * 6 + [None]
            assert str(ip) in steps["lease"]["told"] and "c1" in steps["session"]["told"]
            assert "forwarded by relay" in steps["packet carrier"]["told"]
            assert "direct" in steps["backend tcp:8080"]["told"]
            (frame,) = connector.opens
            assert (frame.destination.ip, frame.destination.port) == (str(ip), 8080)
            assert status(daemon)["streams"]["flows"] == 0
            pong = msgspec.structs.asdict(await daemon.probes["ping"]("echo-service"))
            assert pong["connector_id"] == "c1" and pong["path"] == "forwarded" and pong["ms"] > 0
            assert len(mesh.opens) == 1, "the session is used again, as by any flow"


async def test_it_ends_at_the_step_that_fails_with_its_reason(tmp_path: Path) -> None:
    async with small_mesh(tmp_path) as mesh, agent(mesh, ("echo-service", OTHER)) as daemon:
        steps = await trace(daemon, "billing")
        assert list(steps) == ["grant"] and steps["grant"]["reason"] == "no_grant"
        steps = await trace(daemon, OTHER)
        assert list(steps) == ["grant", "lease"] and steps["lease"]["reason"] == "no_such_service"
        await mesh.lease("echo-service", 2, TCP)
        await until("leased", lambda: len(status(daemon)["services"]) == 1)
        mesh.denying.append(Reason.POLICY_UNKNOWN)
        steps = await trace(daemon)
        assert list(steps)[-1] == "session" and steps["session"]["reason"] == "policy_unknown"
        with pytest.raises(Refused):
            await daemon.probes["ping"](OTHER)
        with pytest.raises(BadName):
            await daemon.probes["ping"]("Not_A_Name")


async def test_a_backend_that_refuses_and_a_relay_that_is_gone_are_said(tmp_path: Path) -> None:
    async with small_mesh(tmp_path) as mesh:
        connector = mesh.connector()
        connector.refusing.append(OpenStatus.REFUSED)
        ip = await mesh.lease("echo-service", 2, TCP)
        async with agent(mesh) as daemon:
            await until("listening", lambda: is_listening(daemon, f"tcp {ip}:8080"))
            steps = await trace(daemon)
            assert steps["session"]["ok"] is True
            assert steps["backend tcp:8080"]["ok"] is False and "refused" in steps["backend tcp:8080"]["told"]
            mesh.relay.close()
            await until("down", lambda: status(daemon)["relays"][0]["state"] != "up")
            with contextlib.suppress(Refused):
                steps = await trace(daemon)
                assert steps["relay"]["ok"] is False


async def test_another_program_does_not_get_the_tried_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    intruders: list[socket.socket] = []
    create = socket.create_server

    def raced(address: tuple[str, int]) -> socket.socket:
        server = create(address)
        intruders.append(socket.create_connection(server.getsockname()))
        return server

    monkeypatch.setattr(socket, "create_server", raced)
    async with asyncio.timeout(20):
        local, program = await _connected_pair()
    with local, program, intruders[0]:
        assert local.getpeername() == program.getsockname()
        with pytest.raises(ConnectionResetError):
            intruders[0].recv(1)

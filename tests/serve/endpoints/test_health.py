"""Liveness says that the process answers; readiness says whether a job would be run now."""

from __future__ import annotations

from tests.serve.conftest import Server


def test_a_warm_server_is_alive_and_ready(server: Server) -> None:
    assert server.get("/healthz").json() == {"status": "ok"}
    ready = server.get("/readyz")
    assert ready.status_code == 200
    assert ready.json() == {"ready": True, "phase": "ready", "model": "wan-tiny"}

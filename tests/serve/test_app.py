"""What every answer of the server has, whichever endpoint gives it."""

from __future__ import annotations

import httpx
import pytest

from tests.serve.conftest import Server


def test_every_answer_has_a_request_id(server: Server) -> None:
    first, second = (server.get("/healthz").headers["x-request-id"] for _ in range(2))
    assert first.startswith("req_") and first != second


def test_a_plain_request_id_of_the_client_is_kept_and_another_is_not(server: Server) -> None:
    kept = httpx.get(f"{server.url}/healthz", headers={"x-request-id": "abc-1"})
    replaced = httpx.get(f"{server.url}/healthz", headers={"x-request-id": "x" * 65})
    assert kept.headers["x-request-id"] == "abc-1"
    assert replaced.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/v1/nothing", 404, "unknown_url"), ("PUT", "/v1/videos", 405, "method_not_allowed")],
)
def test_the_frameworks_own_errors_are_in_the_envelope(
    server: Server, method: str, path: str, status: int, code: str
) -> None:
    answer = httpx.request(method, server.url + path)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["type"]) == (code, "invalid_request_error")


def test_the_api_describes_itself(server: Server) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    assert {"/v1/videos", "/v1/videos/{video_id}", "/v1/videos/{video_id}/content", "/v1/models"} <= set(
        paths
    )
    body = paths["/v1/videos"]["post"]["requestBody"]["content"]
    assert "prompt" in body["multipart/form-data"]["schema"]["properties"]

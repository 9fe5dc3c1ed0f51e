"""What every answer of the server has, whichever endpoint gives it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

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


def statuses_and_codes(source: str) -> set[tuple[int, str]]:
    """Each status that stands before a code in the source: `ApiError(422, "code", ...)` and `{405: "code"}`."""
    found: set[tuple[int, str]] = set()
    for node in ast.walk(ast.parse(source)):
        pairs: list[tuple[ast.expr | None, ast.expr]] = []
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("ApiError", "_answer"):
            pairs = list(zip(node.args[:-1], node.args[1:], strict=True))
        elif isinstance(node, ast.Dict):
            pairs = list(zip(node.keys, node.values, strict=True))
        for status, code in pairs:
            match status, code:
                case ast.Constant(value=int(number)), ast.Constant(value=str(word)):
                    found.add((number, word))
    return found


def test_every_status_and_code_is_in_the_guide(root: Path) -> None:
    rows = [line.split("|") for line in (root / "docs/serving.md").read_text().splitlines() if "|" in line]
    told = {
        (int(status), code)
        for row in rows
        if row[1].strip()[:1].isdigit()
        for status in row[1].split(",")
        for code in re.findall(r"`([a-z_]+)`", row[2])
    }
    used = {pair for file in (root / "serve").rglob("*.py") for pair in statuses_and_codes(file.read_text())}
    assert {(405, "method_not_allowed"), (422, "invalid_size"), (500, "internal_error")} <= used
    assert used <= told, used - told


def test_the_api_describes_itself(server: Server) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    assert {"/v1/videos", "/v1/videos/{video_id}", "/v1/videos/{video_id}/content", "/v1/models"} <= set(
        paths
    )
    body = paths["/v1/videos"]["post"]["requestBody"]["content"]
    assert "prompt" in body["multipart/form-data"]["schema"]["properties"]

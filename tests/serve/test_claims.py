"""What a request claims of itself, or hides in a field: nobody is led elsewhere, and it stays mere text."""

from __future__ import annotations

import socket
from urllib.parse import quote

import httpx
import pytest

from tests.serve.conftest import Server, talk


def test_who_a_proxy_says_that_someone_is_changes_nothing(server: Server) -> None:
    """No one may claim another host, scheme or address: none of these headers is looked at."""
    claims = {"x-forwarded-host": "localhost", "forwarded": "host=localhost;proto=https;for=127.0.0.1"}
    refused = httpx.get(f"{server.url}/v1/videos", headers={"host": "evil.example", **claims})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "host_refused")
    claims = {"x-forwarded-host": "evil.example", "x-forwarded-proto": "https", "x-forwarded-for": "8.8.8.8",
              "x-original-url": "/healthz", "x-http-method-override": "DELETE"}  # fmt: skip
    taken = httpx.get(f"{server.url}/v1/videos", headers=claims)
    assert (taken.status_code, taken.json()["object"]) == (200, "list")
    assert "evil" not in str(taken.headers) + taken.text


@pytest.mark.parametrize(
    "path", ["/v1/videos/", "/v1/models/", "/healthz/", "//evil.example/v1/videos/", "/web/"]
)
def test_nobody_is_sent_elsewhere(server: Server, path: str) -> None:
    """A redirect to the path without a slash would name the host that the request names, and http."""
    answer = talk(server, f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 404") and b"\r\nlocation:" not in answer.lower()


@pytest.mark.parametrize(
    "framing",
    ["content-length: 3\r\ntransfer-encoding: chunked", "transfer-encoding: chunked\r\ncontent-length: 50"],
)
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_body_whose_length_two_could_read_differently_is_refused(
    server: Server, framing: str, version: str
) -> None:
    """Behind a proxy that goes by the other header, what follows would be taken for the next client's request."""
    head = f"POST /v1/videos HTTP/{version}\r\nhost: localhost\r\ncontent-type: application/json\r\n{framing}\r\n\r\n"
    hidden = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with socket.create_connection(server.address, timeout=10) as connection:
        connection.sendall(head.encode() + b"0\r\n\r\n" + hidden)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 400") and b"ambiguous_length" in answer
    assert answer.count(b"HTTP/1.1 ") == 1


def test_transfer_coding_of_an_old_http_is_refused(server: Server) -> None:
    head = b"POST /v1/videos HTTP/1.0\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    assert talk(server, head).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "TRACE", "PATCH", "PROPFIND"])
@pytest.mark.parametrize("path", ["/v1/videos", "/", "/healthz"])
def test_other_methods_are_refused_with_those_that_are_taken(server: Server, method: str, path: str) -> None:
    answer = httpx.request(method, server.url + path, headers={"x-secret": "do not echo"})
    assert answer.status_code == 405 and "GET" in answer.headers["allow"]
    assert "do not echo" not in answer.text and (method == "HEAD") == (answer.content == b"")


def test_nothing_of_a_request_becomes_a_line_of_the_log(server: Server) -> None:
    """As it would look in the text format: the forger's line would begin with a date."""
    forged = "2026-01-01 00:00:00,000 wan_serve ERROR forged"
    fields = ("prompt", "negative_prompt", "model", "size", "seed", "lora", "input_reference", f"x\n{forged}")
    for name in fields:
        body = {"prompt": "x", "num_inference_steps": 0, name: f"x\r\n{forged}\u2028{forged}"}
        answer = httpx.post(
            f"{server.url}/v1/videos", json=body, headers={b"user-agent": f"x\u0085{forged}".encode()}
        )
        assert 400 <= answer.status_code < 500, (name, answer.text)
    for path in (f"/v1/videos/x%0d%0a{forged}", f"/{forged}%0a{forged}", f"/v1/models/%0a{forged}"):
        assert server.get(path.replace(" ", "%20")).status_code == 404
    assert not [line for line in server.log.read_text().splitlines() if line.startswith(forged)]
    assert "forged" not in server.log.read_text()


@pytest.mark.parametrize(
    "value", ["x' OR '1'='1", "'; DROP TABLE jobs; --", 'x" OR "1"="1', "x\\' UNION SELECT 1"]
)
def test_nothing_of_a_request_becomes_sql(server: Server, value: str) -> None:
    listed = server.get("/v1/videos?limit=100").json()["data"]
    url = f"{server.url}/v1/videos"
    assert httpx.get(url, params={"after": value}).status_code == 404
    assert httpx.get(url, params={"order": value}).status_code == 422
    assert httpx.get(f"{url}/{quote(value, safe='')}").status_code == 404
    made = httpx.post(url, json={"prompt": value, "num_frames": 1}, headers={"idempotency-key": quote(value)})
    assert (made.status_code, made.json()["prompt"]) == (200, value)
    assert httpx.delete(f"{url}/{made.json()['id']}").status_code == 200
    assert server.get("/v1/videos?limit=100").json()["data"] == listed

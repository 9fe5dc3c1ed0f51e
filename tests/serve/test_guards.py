"""What is refused before any endpoint sees it, and what every answer carries; raw sockets where clients are polite."""

from __future__ import annotations

import gzip
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import httpx
import pytest

from tests.serve.conftest import Server, running, talk, wait_for
from tests.serve.test_openapi import REQUEST
from wan_runtime import ClipRequest
from wan_runtime.serve.jobs import JobStore
from wan_runtime.serve.storage import Storage, new_id
from wan_runtime.serve.uploads import MAX_BODY

SITE = "https://pages.example"
CLIP = new_id()
LARGE = 32 * 2**20


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that waits one second for a body or for its client to read, lets pages of one site in, and has a clip of
    32 MiB from an earlier life."""
    folder = tmp_path_factory.mktemp("guards")
    storage = Storage(folder)
    storage.prepare()
    store = JobStore(storage.database)
    store.add(CLIP, "wan-tiny", asdict(ClipRequest(**REQUEST)))
    store.claim()
    store.complete(CLIP, size=LARGE)
    store.close()
    storage.video(CLIP).write_bytes(bytes(LARGE))
    options = ("--upload-seconds", "1", "--download-seconds", "1", "--allow-origin", SITE)
    with running(folder, *options) as server:
        yield server


def holders(server: Server, file: Path) -> int:
    """How often the server's process has a file open."""
    links = Path(f"/proc/{server.process.pid}/fd").iterdir()
    return sum(os.path.realpath(link) == str(file.resolve()) for link in links)


def test_a_client_that_does_not_read_the_clip_it_asked_for_is_given_up(hasty: Server) -> None:
    """One second for 64 KiB, here: what is cut off is the connection, and the file is not held any longer."""
    file = Storage(hasty.data_dir).video(CLIP)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect(hasty.address)
        connection.sendall(f"GET /v1/videos/{CLIP}/content HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        assert connection.recv(12) == b"HTTP/1.1 200"
        wait_for(lambda: holders(hasty, file), "the clip to be opened", hasty)
        begin = time.monotonic()
        wait_for(lambda: not holders(hasty, file), "the clip to be let go of", hasty)
        assert 0.4 < time.monotonic() - begin < 15
    whole = httpx.get(f"{hasty.url}/v1/videos/{CLIP}/content")
    assert len(whole.content) == LARGE


@pytest.mark.parametrize(
    ("path", "status"), [("/healthz", 200), ("/v1/videos", 200), ("/v1/none", 404), ("/v1/videos/x", 404)]
)
def test_every_answer_has_the_security_headers(server: Server, path: str, status: int) -> None:
    answer = server.get(path)
    assert answer.status_code == status
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert "server" not in answer.headers


def test_pages_of_other_sites_get_nothing_done_and_no_cors_headers(server: Server) -> None:
    """A form post needs no preflight: without the check any page could fill the queue of its visitor's machine."""
    for origin in (
        "https://evil.example",
        "null",
        "http://127.0.0.1:1",
        server.url.replace("http", "https") + ".x",
    ):
        answer = httpx.post(f"{server.url}/v1/videos", data={"prompt": "x"}, headers={"origin": origin})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_refused")
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    preflight = httpx.options(
        f"{server.url}/v1/videos", headers={"origin": SITE, "access-control-request-method": "POST"}
    )
    assert preflight.status_code == 403
    same = httpx.get(f"{server.url}/v1/videos", headers={"origin": server.url})
    assert same.status_code == 200


def test_an_origin_that_the_operator_named_may(hasty: Server) -> None:
    headers = {"origin": SITE, "access-control-request-method": "POST"}
    preflight = httpx.options(f"{hasty.url}/v1/videos", headers=headers)
    assert preflight.status_code == 200
    answer = httpx.get(f"{hasty.url}/v1/videos", headers={"origin": SITE})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, SITE)
    other = httpx.get(f"{hasty.url}/v1/videos", headers={"origin": f"{SITE}.evil.example"})
    assert other.status_code == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[::2]:80"]
)
def test_a_name_that_was_made_to_point_here_is_refused(server: Server, host: str) -> None:
    answer = httpx.get(f"{server.url}/v1/videos", headers={"host": host})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_refused")


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1", "[::1]:8000"])
def test_names_of_this_machine_are_taken(server: Server, host: str) -> None:
    assert httpx.get(f"{server.url}/v1/videos", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "number",
    [b"a\x0bset-cookie: x=1", b"a%0d%0aset-cookie: x=1", b"a\tb", b"\xe2\x80\xa8", b"a, b", b"../../x"],
)
def test_nothing_of_a_request_becomes_a_header(server: Server, number: bytes) -> None:
    request = (
        b"GET /v1/videos/a%0d%0aset-cookie:%20x=1 HTTP/1.1\r\nhost: localhost\r\nx-request-id: " + number
    )
    answer = talk(server, request + b"\r\nconnection: close\r\n\r\n").lower()
    head = answer.partition(b"\r\n\r\n")[0]
    assert head.startswith((b"http/1.1 404", b"http/1.1 400"))
    assert b"\r\nset-cookie" not in head and b"x-request-id: a" not in head


@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_that_trickles_in_is_given_up(hasty: Server, chunked: bool) -> None:
    framing = b"transfer-encoding: chunked" if chunked else b"content-length: 1000"
    head = b"POST /v1/videos HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n" + framing
    begin = time.monotonic()
    answer = talk(hasty, head + b"\r\n\r\n" + (b"1\r\n{\r\n" if chunked else b"{"))
    assert answer.startswith(b"HTTP/1.1 408") and b"connection: close" in answer.lower()
    assert 0.9 < time.monotonic() - begin < 8


def test_a_form_that_trickles_in_is_given_up(hasty: Server) -> None:
    head = (
        b"POST /v1/videos HTTP/1.1\r\nhost: localhost\r\ncontent-type: multipart/form-data; boundary=b\r\n"
        b"content-length: 1000\r\n\r\n--b\r\n"
    )
    assert talk(hasty, head).startswith(b"HTTP/1.1 408")


def test_a_compressed_body_is_not_unpacked(server: Server) -> None:
    bomb = gzip.compress(b'{"prompt": "' + b"x" * 10_000_000)
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    answer = httpx.post(f"{server.url}/v1/videos", content=bomb, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_deep_json_is_refused(server: Server) -> None:
    body = b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    answer = httpx.post(f"{server.url}/v1/videos", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("length", [MAX_BODY + 1, 2**33])
def test_oversized_json_is_cut_off_while_it_arrives(server: Server, length: int) -> None:
    """The answer comes after the first 48 MiB, though most of the body was never sent."""
    head = b"POST /v1/videos HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    answer = talk(server, head + b"content-length: %d\r\n\r\n" % length + b"x" * (MAX_BODY + 1))
    assert answer.startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "path", ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/videos/..%2f..%2fjobs.sqlite3/content",
             "/v1/videos/%2e%2e/content", "/v1/videos//content", "/web/../cli.py", "/..%2fserver.log"],
)  # fmt: skip
def test_no_path_leads_out(server: Server, path: str) -> None:
    request = f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()
    answer = talk(server, request)
    assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 405", b"HTTP/1.1 400")), answer[:200]


def test_a_traversing_file_name_is_written_nowhere(server: Server, tmp_path: Path) -> None:
    name = f"../../../../../../../..{tmp_path}/planted.png"
    files = {"input_reference": (name, b"\x89PNG", "image/png")}
    answer = httpx.post(f"{server.url}/v1/videos", data={"prompt": "x"}, files=files)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "input_reference_unsupported")
    assert list(tmp_path.iterdir()) == []


def test_the_schema_is_here_and_its_pages_with_foreign_scripts_are_not(server: Server) -> None:
    assert json.loads(server.get("/openapi.json").text)["info"]["title"] == "wan-serve"
    assert [server.get(path).status_code for path in ("/docs", "/redoc")] == [404, 404]


@pytest.mark.parametrize(
    "sent", [b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nx: "]
)
def test_a_head_that_trickles_in_is_given_up(hasty: Server, sent: bytes) -> None:
    begin = time.monotonic()
    assert talk(hasty, sent) == b""
    assert 0.9 < time.monotonic() - begin < 8


def test_a_second_head_that_trickles_in_is_given_up_too(hasty: Server) -> None:
    """Whoever has been answered once could otherwise hold the connection with half a request."""
    with socket.create_connection(hasty.address, timeout=10) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        begin = time.monotonic()
        connection.sendall(b"GET /healthz HT")
        while connection.recv(65536):
            pass
        assert 0.9 < time.monotonic() - begin < 8


def test_a_connection_that_is_answered_in_time_is_kept(hasty: Server) -> None:
    with httpx.Client() as client:
        assert client.get(f"{hasty.url}/healthz").status_code == 200
        time.sleep(1.5)
        answer = client.get(f"{hasty.url}/healthz")
        assert answer.status_code == 200
        assert client._transport._pool.connections[0].info().endswith("Request Count: 2")  # type: ignore[attr-defined]


def test_heads_are_bounded(server: Server) -> None:
    """4 MiB of one header, and of many: refused before they have all come. One read's worth may pass."""
    for headers in (b"x: " + b"y" * 2**22, b"\r\n".join(b"x%d: %s" % (n, b"y" * 64) for n in range(60_000))):
        try:
            answer = talk(server, b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n" + headers + b"\r\n\r\n")
        except ConnectionError:  # it was closed while the rest was still being sent
            continue
        assert answer.startswith(b"HTTP/1.1 400")

"""Bodies that no well-behaved client sends: each is refused in the envelope, and none reaches the model."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.serve.conftest import Server, wait_for
from wan_runtime.serve.errors import ApiError
from wan_runtime.serve.uploads import MAX_BODY, SMALL, Uploads

JSON = {"content-type": "application/json"}
PLAIN, MULTIPART = "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"
DATA_URL = b'{"prompt": "x", "input_reference": "data:image/png;base64,'


def field(name: str, value: bytes, more: str = "x=y") -> bytes:
    """One part of a multipart body."""
    return f'--x\r\ncontent-disposition: form-data; name="{name}"; {more}\r\n\r\n'.encode() + value + b"\r\n"


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as http:
        yield http


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"[]", 400, "invalid_json"),
        (b"\xff", 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        (b"{}", 422, "missing_parameter"),
        (b'{"prompt": 3}', 422, "invalid_prompt"),
        (b'{"prompt": null}', 422, "missing_parameter"),
        (b'{"prompt": "\\ud800"}', 422, "invalid_prompt"),
        (b'{"prompt": "x", "guidance_scale": NaN}', 422, "invalid_guidance_scale"),
        (b'{"prompt": "x", "seconds": 1e400}', 422, "invalid_seconds"),
        (b'{"prompt": "x", "seed": 1e30}', 422, "invalid_seed"),
        (b'{"prompt": "x", "seed": [1]}', 422, "invalid_seed"),
        (b'{"prompt": "x", "seed": true}', 422, "invalid_seed"),
        (b'{"prompt": "x", "guidance_scale": false}', 422, "invalid_guidance_scale"),
        (b'{"prompt": "x", "size": "128x128", "width": 0, "height": 128}', 422, "conflicting_parameters"),
        (b'{"prompt": "x", "size": "128x128", "height": 0}', 422, "conflicting_parameters"),
        (b'{"prompt": "x", "num_frames": 1' + b"0" * 400 + b"}", 422, "invalid_num_frames"),
        (b'{"prompt": "' + b"x" * 2**20 + b'"}', 422, "invalid_prompt"),
        (b'{"prompt": "' + b"x" * 48 * 2**20 + b'"}', 413, "request_too_large"),
        (b'{"prompt": ' + b"[]," * 2**23 + b"}", 400, "invalid_json"),
        (b'{"prompt": "x", "prompt": "y"}', 400, "duplicate_parameter"),
        (b'{"prompt": "x", "\\ud800": 1}', 400, "invalid_json"),
        (b'{"prompt": "x", "lora[\\ud800]": 1}', 400, "invalid_json"),
        (b'{"prompt": "x", "lora": [{"name": "a", "\\ud800": 1}]}', 400, "invalid_json"),
        (b'{"prompt": "x", "model": "\\ud800"}', 404, "model_not_found"),
        (b'{"prompt": "x", "size": "\\ud800"}', 422, "invalid_size"),
        (b'{"prompt": "x", "negative_prompt": "\\ud800"}', 422, "invalid_negative_prompt"),
        (b'{"prompt": "x", "input_reference": {"\\ud800": 1}}', 400, "invalid_json"),
        (
            b'{"prompt": "x", "input_reference": "data:image/png;base64,\\ud800"}',
            422,
            "invalid_input_reference",
        ),
        (b'{"prompt": "x", "seed": ' + b"9" * 4000 + b"}", 422, "invalid_seed"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
        (b'{"prompt": "x", "num_frames": ' + b"9" * 4300 + b"}", 422, "invalid_num_frames"),
        (b'{"prompt": "x", "seconds": 1, "fps": ' + b"9" * 400 + b"}", 422, "invalid_fps"),
        (b'{"prompt": "x", "width": %d, "height": %d}' % ((16 * 10**2200,) * 2), 422, "invalid_size"),
        (b'{"prompt": "x", "width": %d, "height": %d}' % ((2**62,) * 2), 422, "invalid_size"),
        (b'{"prompt": "x", "guidance_scale": ' + b"9" * 400 + b"}", 422, "invalid_guidance_scale"),
        (b'{"prompt": "x\0"}', 400, "invalid_json"),
        (
            b'{"prompt": "x", "input_reference": "data:image/png;base64,' + b"%41" * 2**22 + b'"}',
            422,
            "invalid_input_reference",
        ),
    ],
)
def test_bad_json_is_refused(http: httpx.Client, body: bytes, status: int, code: str) -> None:
    answer = http.post("/v1/videos", content=body, headers=JSON)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b"nonsense", "multipart/form-data; boundary=x", 400, "invalid_form"),
        (b"--x\r\n", "multipart/form-data", 400, "invalid_form"),
        (b"prompt=a&prompt=b", PLAIN, 400, "duplicate_parameter"),
        (b"seed=seven&prompt=a", PLAIN, 422, "invalid_seed"),
        (b"", PLAIN, 422, "missing_parameter"),
        (b"prompt", "text/plain", 415, "unsupported_media_type"),
        (b"&" * 2**25, PLAIN, 400, "invalid_form"),
        (b"prompt=" + b"%41" * (2**21 + 1), PLAIN, 400, "invalid_form"),
        (b"prompt=%ff", PLAIN, 400, "invalid_form"),
        (b"prompt=\xff", PLAIN, 400, "invalid_form"),
        (b"a=1&" * 65, PLAIN, 400, "invalid_form"),
        (field("lora[]", b"") * 100_000 + b"--x--", MULTIPART, 400, "invalid_form"),
        (field("prompt", b"x") + b"--x\r\nx: " + b"y" * 2**20, MULTIPART, 400, "invalid_form"),
        (field("prompt", b"x") + b"--x--", MULTIPART + "; charset=undefined", 400, "invalid_form"),
        (field("prompt", b"x") + b"--x--", MULTIPART + '; CharSet = "utf-16"', 400, "invalid_form"),
        (field("prompt", b"x") + b"--x--", MULTIPART + "; charset=utf-8; charset=idna", 400, "invalid_form"),
        (
            field("prompt", b"x") + b"--x--",
            MULTIPART + "; charset*0=puny; charset*1=code",
            400,
            "invalid_form",
        ),
        (b"prompt=x", PLAIN + "; charset=utf-7", 400, "invalid_form"),
        (field("prompt", b"x", 'filename="a"') * 3 + b"--x--", MULTIPART, 400, "invalid_form"),
    ],
)
def test_bad_forms_are_refused(http: httpx.Client, body: bytes, kind: str, status: int, code: str) -> None:
    answer = http.post("/v1/videos", content=body, headers={"content-type": kind})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_a_body_without_a_type_is_refused(http: httpx.Client) -> None:
    answer = http.post("/v1/videos", content=b"prompt=a")
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_an_endless_upload_is_cut_off(http: httpx.Client) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield b'--x\r\ncontent-disposition: form-data; name="input_reference"; filename="a.png"\r\n\r\n'
        while sent < 2**30:
            sent += 2**20
            yield b"\0" * 2**20

    try:
        answer = http.post(
            "/v1/videos", content=endless(), headers={"content-type": "multipart/form-data; boundary=x"}
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    except httpx.TransportError:
        pass  # cut off while we were still writing, before we could read why
    assert sent < 2**29


def test_a_field_sent_as_a_file_is_refused(http: httpx.Client) -> None:
    answer = http.post("/v1/videos", files={"prompt": ("../../x", b"hello")})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_prompt")
    assert "as a file" in answer.json()["error"]["message"]


@pytest.mark.parametrize("charset", ["", "; charset=utf-8", '; charset="UTF-8"'])
def test_a_form_may_say_that_it_is_utf_8(http: httpx.Client, charset: str) -> None:
    body = field("prompt", "zwölf Boxkämpfer".encode()) + field("num_frames", b"1") + b"--x--"
    answer = http.post("/v1/videos", content=body, headers={"content-type": MULTIPART + charset})
    assert (answer.status_code, answer.json()["prompt"]) == (200, "zwölf Boxkämpfer")
    http.delete(f"/v1/videos/{answer.json()['id']}")


def test_a_body_in_an_encoding_that_is_slow_to_decode_holds_nobody_up(http: httpx.Client) -> None:
    """punycode takes the square of a text's length: 0.4 MB would stop the event loop for 14 s."""
    body = field("prompt", b"a" * 200_000 + b"-" + b"9" * 200_000) + b"--x--"
    begin = time.monotonic()
    answer = http.post("/v1/videos", content=body, headers={"content-type": MULTIPART + "; charset=punycode"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_form")
    assert time.monotonic() - begin < 3


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (DATA_URL + b"A" * 44 * 2**20 + b'"}', "application/json"),
        (DATA_URL + b"%41" * 14 * 2**20 + b'"}', "application/json"),
        (b'{"prompt": "' + b"x" * 44 * 2**20 + b'"}', "application/json"),
        (field("prompt", b"x" * 44 * 2**20) + b"--x--", MULTIPART),
        (b"input_reference=data:image/png;base64," + b"%2B%2f" * 2**20 + b"A" * 38 * 2**20, PLAIN),
    ],
    ids=["image", "percent", "prompt", "form", "plain"],
)  # fmt: skip
def test_the_largest_bodies_hold_nobody_up(server: Server, body: bytes, kind: str) -> None:
    """Others are answered meanwhile: decoding happens beside the event loop, and takes no multiple of the memory."""
    longest = 0.0
    done = threading.Event()

    def poll() -> None:
        nonlocal longest
        with httpx.Client(base_url=server.url, timeout=30) as other:
            while not done.is_set():
                begin = time.monotonic()
                other.get("/healthz")
                longest = max(longest, time.monotonic() - begin)

    poller = threading.Thread(target=poll)
    poller.start()
    answer = httpx.post(f"{server.url}/v1/videos", content=body, headers={"content-type": kind}, timeout=60)
    done.set()
    poller.join()
    assert answer.status_code == 422
    assert longest < 2


def test_what_all_bodies_take_together_is_bounded() -> None:
    """Each may be 48 MiB: twenty at once would be a gigabyte, before anything is decoded."""
    uploads = Uploads(most=3 * MAX_BODY)
    with contextlib.ExitStack() as open_ones:
        for _ in range(3):
            open_ones.enter_context(uploads.counting())(MAX_BODY)
        small, large = (open_ones.enter_context(uploads.counting()) for _ in range(2))
        small(SMALL)
        with pytest.raises(ApiError) as full:
            large(4 * SMALL + MAX_BODY // 2)
        assert (full.value.status, full.value.code) == (503, "too_many_uploads")
        assert full.value.headers == {"Retry-After": "5", "connection": "close"}
    assert uploads.held == 0
    with uploads.counting() as count, pytest.raises(ApiError) as too_large:
        count(MAX_BODY + 1)
    assert too_large.value.status == 413 and uploads.held == 0


@pytest.mark.long
def test_a_server_that_holds_too_much_says_so_and_goes_on(server: Server) -> None:
    """Nine bodies of which all but the last byte is sent: eight are waited for, and the ninth is told to come again."""
    head = (
        "POST /v1/videos HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {MAX_BODY}\r\n\r\n"
    )
    with contextlib.ExitStack() as connections:
        answers = []
        for _ in range(9):
            connection = connections.enter_context(socket.create_connection(server.address, timeout=120))
            connection.sendall(head.encode())
            answers.append(connection)
        for connection in answers[:8]:
            connection.sendall(b" " * (MAX_BODY - 1))
        with contextlib.suppress(ConnectionError):  # it does not listen to the end
            answers[8].sendall(b" " * (MAX_BODY - 1))
        got = answers[8].recv(65536)
        assert (
            got.startswith(b"HTTP/1.1 503")
            and b"too_many_uploads" in got
            and b"retry-after: 5" in got.lower()
        )
        small = httpx.post(f"{server.url}/v1/videos", json={"prompt": " "})
        assert (small.status_code, small.json()["error"]["code"]) == (422, "invalid_prompt")
    wait_for(lambda: httpx.post(f"{server.url}/v1/videos", content=b" " * 2**20, headers=JSON).status_code == 400,
             "the memory to be given back", server)  # fmt: skip

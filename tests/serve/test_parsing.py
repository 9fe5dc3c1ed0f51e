"""Bodies that no well-behaved client sends: each is refused in the envelope, and none reaches the model."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.serve.conftest import Server

JSON = {"content-type": "application/json"}


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
        (b"prompt=a&prompt=b", "application/x-www-form-urlencoded", 400, "duplicate_parameter"),
        (b"seed=seven&prompt=a", "application/x-www-form-urlencoded", 422, "invalid_seed"),
        (b"", "application/x-www-form-urlencoded", 422, "missing_parameter"),
        (b"prompt", "text/plain", 415, "unsupported_media_type"),
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

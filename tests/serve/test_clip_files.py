"""Byte ranges of a clip that cannot be served, or that would cost too much; those that can are in `test_videos.py`."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.serve.conftest import QUICK, Server

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.fixture(scope="module")
def clip(server: Server) -> Iterator[tuple[str, bytes]]:
    """A clip's id and its bytes."""
    with server.client() as client:
        made = client.videos.create_and_poll(prompt="a red circle", extra_body=QUICK)
        yield made.id, client.videos.download_content(made.id).content
        client.videos.delete(made.id)


@pytest.mark.parametrize(
    ("asked", "status", "code"),
    [
        ("bytes=99999999-", 416, "range_not_satisfiable"),
        ("bytes=5-2", 400, "invalid_range"),
        ("bytes=", 400, "invalid_range"),
        ("lines=1-2", 400, "invalid_range"),
        ("bytes=-" + "9" * 5000, 400, "invalid_range"),
    ],
)
def test_a_range_that_is_not_there_is_refused_in_the_envelope(
    server: Server, clip: tuple[str, bytes], asked: str, status: int, code: str
) -> None:
    answer = httpx.get(f"{server.url}/v1/videos/{clip[0]}/content", headers={"range": asked})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.headers.get("content-range", "").startswith("bytes */") == (status == 416)


def test_many_ranges_are_served_as_one_file(server: Server, clip: tuple[str, bytes]) -> None:
    """Each of them is a seek, a read and a head of its own; overlapping ones would repeat the file."""
    url = f"{server.url}/v1/videos/{clip[0]}/content"
    spread = httpx.get(url, headers={"range": "bytes=" + ",".join(f"{n}-{n}" for n in range(0, 4000, 2))})
    assert (spread.status_code, spread.content) == (200, clip[1])
    same = httpx.get(url, headers={"range": "bytes=" + ",".join(["0-"] * 90)})
    assert (same.status_code, same.content) == (206, clip[1])
    two = httpx.get(url, headers={"range": "bytes=0-3,8-11"})
    assert two.headers["content-type"].startswith("multipart/byteranges") and clip[1][8:12] in two.content


def test_a_clip_whose_file_is_gone_is_not_found(server: Server, clip: tuple[str, bytes]) -> None:
    """As between another request's delete and its row's: not a 500."""
    file = server.data_dir / "videos" / f"{clip[0]}.mp4"
    aside = file.rename(file.with_suffix(".aside"))
    answer = httpx.get(f"{server.url}/v1/videos/{clip[0]}/content")
    aside.rename(file)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "video_not_found")

"""Who may do what, on a server with API keys, asked by the real `openai` client and by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import openai
import pytest

from tests.serve.conftest import QUICK, Server, running
from wan_runtime.serve import keys

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
UNKNOWN = "video_" + "0" * 32
LONG = {**QUICK, "num_inference_steps": 200}


class Guarded(NamedTuple):
    """A server with keys, the file they are in, and two of them."""

    server: Server
    file: Path
    alice: str
    bob: str

    def client(self, key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.server.url}/v1", api_key=key, max_retries=0)

    def new_key(self, name: str, **limits: int) -> str:
        key, record = keys.make(name, **limits)
        keys.add(self.file, record)
        return key


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("auth")
    file = folder / "keys.json"
    made = [keys.make(name) for name in ("alice", "bob")]
    for _, record in made:
        keys.add(file, record)
    with running(folder / "data", "--api-keys", str(file)) as server:
        server.wait_ready()
        yield Guarded(server, file, made[0][0], made[1][0])


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer none",
        "Basic {key}",
        "{key}",
        "Bearer {key}x",
        "Bearer wan_00000000_{secret}",
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/videos"),
        ("POST", "/v1/videos"),
        ("GET", f"/v1/videos/{UNKNOWN}"),
        ("GET", f"/v1/videos/{UNKNOWN}/content"),
        ("DELETE", f"/v1/videos/{UNKNOWN}"),
        ("GET", "/v1/models"),
    ],
)
def test_without_a_valid_key_nothing_is_done(
    guarded: Guarded, header: str | None, method: str, path: str
) -> None:
    secret = guarded.alice.rpartition("_")[2]
    headers = {} if header is None else {"authorization": header.format(key=guarded.alice, secret=secret)}
    answer = httpx.request(method, guarded.server.url + path, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_every_call_but_the_public_ones_asks_for_a_key(guarded: Guarded) -> None:
    """Read from the API's own description, so that a new endpoint is public on purpose or not at all."""
    paths = httpx.get(f"{guarded.server.url}/openapi.json").json()["paths"]
    public = set()
    for path, methods in paths.items():
        for method in methods:
            answer = httpx.request(
                method, guarded.server.url + path.format(video_id=UNKNOWN, model="wan-tiny")
            )
            if answer.status_code != 401:
                public.add(path)
    assert public == {"/healthz", "/readyz"}


def test_the_client_raises_an_authentication_error(guarded: Guarded) -> None:
    with guarded.client("wrong") as client, pytest.raises(openai.AuthenticationError) as refused:
        client.videos.list()
    assert refused.value.code == "invalid_api_key"


def test_the_jobs_of_another_key_are_not_there(guarded: Guarded) -> None:
    with guarded.client(guarded.alice) as alice, guarded.client(guarded.bob) as bob:
        video = alice.videos.create_and_poll(prompt="a red circle", extra_body=QUICK)
        assert video.status == "completed"
        for steal in (
            lambda: bob.videos.retrieve(video.id),
            lambda: bob.videos.download_content(video.id),
            lambda: bob.videos.delete(video.id),
            lambda: bob.videos.list(after=video.id),
        ):
            with pytest.raises(openai.NotFoundError) as hidden:
                steal()
            with pytest.raises(openai.NotFoundError) as absent:
                bob.videos.retrieve(UNKNOWN)
            assert hidden.value.code == absent.value.code == "video_not_found"
            assert hidden.value.message.replace(video.id, UNKNOWN) == absent.value.message
        mine = f"{guarded.server.url}/v1/videos"
        for method, path in (
            ("GET", f"/{video.id}/events"),
            ("POST", f"/{video.id}/cancel"),
            ("GET", f"/{video.id}/content?variant=thumbnail"),
            ("GET", f"?after={video.id}"),
            ("GET", f"?after={video.id}&after="),
            ("GET", f"?after=&after={video.id}"),
        ):
            answer = httpx.request(method, mine + path, headers={"authorization": f"Bearer {guarded.bob}"})
            assert video.id not in answer.text.replace(f"the id '{video.id}'", ""), path
            assert answer.status_code == 404, path
        assert [job.id for job in bob.videos.list()] == []
        assert video.id in [job.id for job in alice.videos.list()]
        assert alice.videos.download_content(video.id).read()[4:8] == b"ftyp"
        assert alice.videos.delete(video.id).deleted


def test_a_key_that_is_revoked_is_out_at_once_and_a_new_one_in(guarded: Guarded) -> None:
    key = guarded.new_key("carol")
    with guarded.client(key) as client:
        client.videos.list()
        keys.revoke(guarded.file, "carol")
        with pytest.raises(openai.AuthenticationError):
            client.videos.list()


def test_a_broken_key_file_lets_nobody_new_in_and_nobody_out(guarded: Guarded) -> None:
    good = guarded.file.read_bytes()
    try:
        guarded.file.write_text("{")
        with guarded.client(guarded.alice) as alice:
            alice.videos.list()
        assert httpx.get(f"{guarded.server.url}/v1/videos").status_code == 401
        assert "the API keys stay as they were" in guarded.server.log.read_text()
    finally:
        guarded.file.write_bytes(good)


def test_a_keys_jobs_at_once_are_limited(guarded: Guarded) -> None:
    key = guarded.new_key("dave", max_active=2)
    with guarded.client(key) as dave, guarded.client(guarded.bob) as bob:
        first, second = (dave.videos.create(prompt="a red circle", extra_body=LONG) for _ in range(2))
        with pytest.raises(openai.RateLimitError) as refused:
            dave.videos.create(prompt="a red circle", extra_body=LONG)
        assert refused.value.code == "too_many_jobs"
        assert int(refused.value.response.headers["retry-after"]) > 0
        bob.videos.delete(
            bob.videos.create(prompt="a red circle", extra_body=QUICK).id
        )  # others are not held up
        for video in (second, first):
            dave.videos.delete(video.id)
        dave.videos.delete(dave.videos.create(prompt="a red circle", extra_body=QUICK).id)


def test_a_keys_creates_a_minute_are_limited(guarded: Guarded) -> None:
    key = guarded.new_key("erin", per_minute=1)
    with guarded.client(key) as erin:
        erin.videos.delete(erin.videos.create(prompt="a red circle", extra_body=QUICK).id)
        with pytest.raises(openai.RateLimitError) as refused:
            erin.videos.create(prompt="a red circle", extra_body=QUICK)
        assert refused.value.code == "rate_limited"
        assert 0 < int(refused.value.response.headers["retry-after"]) <= 60
        erin.videos.list()  # looking is not limited
        for name in ("X-Forwarded-For", "Forwarded", "X-Real-IP"):  # nor is it counted by address
            with pytest.raises(openai.RateLimitError):
                erin.videos.create(prompt="a red circle", extra_headers={name: "for=10.1.2.3"})


def test_no_key_is_in_the_log_or_the_data(guarded: Guarded) -> None:
    with guarded.client(guarded.alice) as alice:
        alice.videos.list()
    secret = guarded.alice.rpartition("_")[2].encode()
    for path in [guarded.file, *guarded.server.data_dir.rglob("*")]:
        assert path.is_dir() or secret not in path.read_bytes(), path


def test_an_idempotency_key_belongs_to_its_api_key(guarded: Guarded) -> None:
    """Whoever guesses another's finds out nothing: neither that it was used, nor with what."""
    named = {"extra_headers": {"Idempotency-Key": "monday"}, "extra_body": LONG}
    with guarded.client(guarded.alice) as alice, guarded.client(guarded.bob) as bob:
        first = alice.videos.create(prompt="a red circle", **named)  # type: ignore[arg-type]
        other = bob.videos.create(prompt="a blue square", **named)  # type: ignore[arg-type]
        assert (first.id != other.id, other.prompt) == (True, "a blue square")
        with pytest.raises(openai.UnprocessableEntityError) as reused:
            alice.videos.create(prompt="a blue square", **named)  # type: ignore[arg-type]
        assert reused.value.code == "idempotency_key_reused"
        assert alice.videos.create(prompt="a red circle", **named).id == first.id  # type: ignore[arg-type]
        bob.videos.delete(other.id)
        alice.videos.delete(first.id)

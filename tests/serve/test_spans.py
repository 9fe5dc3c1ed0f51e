"""OpenTelemetry: a real server's spans, as they arrive at a collector that reads OTLP."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import openai
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from starlette.datastructures import Headers

from tests.serve.collecting import Collector, values
from tests.serve.conftest import QUICK, Server, running, wait_for
from wan_runtime.serve import keys
from wan_runtime.serve.collector import open_provider
from wan_runtime.serve.jobs import JobStore
from wan_runtime.serve.otlp import traces_url
from wan_runtime.serve.spans import Spans, trace_of

pytestmark = [pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning"), pytest.mark.slow]
PROMPT = "a small purple circle moving up on a green background"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
LONG = {**QUICK, "num_inference_steps": 200}
PHASES = ["queued", "text", "denoise", "decode", "encode"]
ENVIRONMENT = {
    "OTEL_BSP_SCHEDULE_DELAY": "100",
    "OTEL_EXPORTER_OTLP_TIMEOUT": "3",
    "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
    "FASTAPI_OTEL_AUTO_CONFIGURE": "true",  # FastAPI's own telemetry stays off all the same
}


@dataclass(frozen=True)
class Traced:
    """A server that sends spans, the collector that gets them, and a client with a key."""

    server: Server
    collector: Collector
    secret: str
    key_id: str
    options: tuple[str, ...]

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.server.url}/v1", api_key=self.secret, max_retries=0)

    def cancel(self, job: str) -> None:
        headers = {"authorization": f"Bearer {self.secret}"}
        httpx.post(f"{self.server.url}/v1/videos/{job}/cancel", headers=headers, timeout=60)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    root = tmp_path_factory.mktemp("traced")
    secret, record = keys.make("tester")
    keys.add(root / "keys.json", record)
    collector = Collector()
    options = (
        "--otlp-endpoint",
        collector.url,
        "--api-keys",
        str(root / "keys.json"),
        "--drain-seconds",
        "0",
    )
    environment = {**ENVIRONMENT, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
    try:
        with running(root / "data", *options, **environment) as server:
            server.wait_ready()
            yield Traced(server, collector, secret, record.id, options)
    finally:
        collector.stop()


def step_of(client: openai.OpenAI, job: str) -> int:
    return int((client.videos.retrieve(job).model_extra or {})["step"])


def check_nesting(job: Span, phases: list[Span]) -> None:
    """Phases follow each other without a gap, from the job's beginning to its end, and say whose they are."""
    assert phases[0].start_time_unix_nano == job.start_time_unix_nano
    assert phases[-1].end_time_unix_nano == job.end_time_unix_nano
    for one, other in itertools.pairwise(phases):
        assert one.start_time_unix_nano <= one.end_time_unix_nano == other.start_time_unix_nano
    assert {span.trace_id for span in phases} == {job.trace_id}


def test_a_job_is_a_span_below_the_clients_with_its_phases_inside(traced: Traced) -> None:
    body = {**QUICK, "num_inference_steps": 60, "seed": 7}
    headers = {"traceparent": TRACEPARENT, "tracestate": "vendor=1"}
    before = time.time_ns()
    with traced.client() as client:
        made = client.videos.create(prompt=PROMPT, extra_body=body, extra_headers=headers)
        wait_for(lambda: step_of(client, made.id) > 0, "a first step")
        stepped = time.time_ns()
        assert client.videos.poll(made.id).status == "completed"
    after = time.time_ns()
    job = traced.collector.job(made.id)
    assert (job.name, job.trace_id.hex(), job.parent_span_id.hex()) == ("job", TRACE, PARENT)
    assert (job.trace_state, job.status.code) == ("vendor=1", Status.STATUS_CODE_UNSET)
    assert before < job.start_time_unix_nano < stepped < job.end_time_unix_nano < after
    assert values(job.attributes) == {
        "wan.job.id": made.id, "wan.job.status": "completed", "wan.job.attempts": 1, "wan.model": "wan-tiny",
        "wan.size": "64x64", "wan.num_frames": 5, "wan.num_inference_steps": 60, "wan.seed": 7,
        "wan.key.id": traced.key_id,
    }  # fmt: skip
    phases = traced.collector.phases(job)
    assert [span.name for span in phases] == PHASES
    check_nesting(job, phases)
    assert phases[2].start_time_unix_nano < stepped < phases[2].end_time_unix_nano


def test_cancelled_jobs_have_the_error_and_those_without_a_valid_parent_a_trace_of_their_own(
    traced: Traced,
) -> None:
    with traced.client() as client:
        malformed = {"traceparent": TRACEPARENT.replace("-01", "-1")}
        ran = client.videos.create(prompt=PROMPT, extra_body=LONG, extra_headers=malformed).id
        waited = client.videos.create(prompt=PROMPT, extra_body=LONG).id
        wait_for(lambda: step_of(client, ran) > 0, "a first step")
        traced.cancel(waited)
        client.videos.delete(ran)  # cancels it first, and takes the row away
    jobs = [traced.collector.job(name) for name in (ran, waited)]
    for job in jobs:
        assert (job.status.code, job.status.message) == (Status.STATUS_CODE_ERROR, "cancelled")
        assert values(job.attributes)["error.type"] == "cancelled"
        assert job.parent_span_id == b""
    assert len({TRACE, *(job.trace_id.hex() for job in jobs)}) == 3
    of_ran, of_waited = map(traced.collector.phases, jobs)
    assert [span.name for span in of_ran] == ["queued", "text", "denoise"]
    assert [span.name for span in of_waited] == ["queued"]
    for job, phases in zip(jobs, (of_ran, of_waited), strict=True):
        check_nesting(job, phases)
    codes = [span.status.code for span in of_ran]
    assert codes == [Status.STATUS_CODE_UNSET, Status.STATUS_CODE_UNSET, Status.STATUS_CODE_ERROR]


def test_what_is_sent_says_who_sends_it_and_holds_neither_prompt_nor_key(traced: Traced) -> None:
    sent = b"".join(traced.collector.bodies)
    assert b"wan.job.id" in sent
    for hidden in (
        PROMPT.encode(),
        b"purple",
        traced.secret.encode(),
        traced.secret.rpartition("_")[2].encode(),
    ):
        assert hidden not in sent
    assert {span.name for span in traced.collector.spans()} <= {"job", "loading", *PHASES}  # and no request's
    [resource] = {
        resource.SerializeToString(): resource
        for request in traced.collector.requests
        for resource in (each.resource for each in request.resource_spans)
    }.values()
    told = values(resource.attributes)
    assert told["service.name"] == "wan-serve"
    assert told["deployment.environment.name"] == "test"


def test_a_collector_that_is_gone_costs_a_warning(traced: Traced) -> None:
    traced.collector.stop()
    with traced.client() as client:
        for number in range(2):
            video = client.videos.create_and_poll(prompt=PROMPT, extra_body={**QUICK, "seed": number})
            assert video.status == "completed"
            time.sleep(1)  # OpenTelemetry's exporter tries again meanwhile, and would log each time
        told = complaints(traced.server)
        assert len(told) == 1, told
        assert "takes no spans, and they are dropped until it does" in told[0] and "refused" in told[0]
        traced.collector.start()
        video = client.videos.create_and_poll(prompt=PROMPT, extra_body=QUICK)
    assert traced.collector.job(video.id).status.code == Status.STATUS_CODE_UNSET
    wait_for(lambda: len(complaints(traced.server)) == 2, "the all-clear", traced.server)
    assert complaints(traced.server)[1].endswith("/v1/traces takes spans again")


def complaints(server: Server) -> list[str]:
    lines = server.log.read_text().splitlines()
    return [line for line in lines if "/v1/traces" in line or "opentelemetry" in line or "Traceback" in line]


@pytest.mark.long
def test_a_job_keeps_its_trace_over_a_restart_and_the_last_spans_are_sent_at_the_end(traced: Traced) -> None:
    with traced.client() as client:
        headers = {"traceparent": TRACEPARENT}
        body = {**QUICK, "num_inference_steps": 60}
        made = client.videos.create(prompt=PROMPT, extra_body=body, extra_headers=headers).id
        wait_for(lambda: step_of(client, made) > 0, "a first step")
    traced.server.process.terminate()
    assert traced.server.process.wait(60) == 0
    late = {**ENVIRONMENT, "OTEL_BSP_SCHEDULE_DELAY": "600000"}  # nothing is sent before the end
    with running(traced.server.data_dir, *traced.options, "--drain-seconds", "30", **late) as server:
        with replace(traced, server=server).client() as client:
            assert client.videos.poll(made).status == "completed"
        assert made.encode() not in b"".join(traced.collector.bodies)
        server.process.terminate()
        assert server.process.wait(60) == 0
    job = traced.collector.job(made)
    assert (job.trace_id.hex(), job.parent_span_id.hex()) == (TRACE, PARENT)
    phases = traced.collector.phases(job)
    assert [span.name for span in phases] == ["loading", *PHASES]
    # what was before the restart is in the job's time and in no phase
    assert job.start_time_unix_nano < phases[0].start_time_unix_nano
    assert job.end_time_unix_nano == phases[-1].end_time_unix_nano


def test_the_end_does_not_wait_for_a_collector_that_does_not_answer(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite3")
    job = store.add("a", "wan-tiny", {**QUICK, "seed": 1})
    store.close()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        spans = Spans(open_provider(traces_url(f"http://127.0.0.1:{silent.getsockname()[1]}")))
        spans.ended(job, [])
        began = time.monotonic()
        spans.close(0.5)
        assert 0.5 <= time.monotonic() - began < 2


@pytest.mark.parametrize(
    "sent",
    [
        [],
        [TRACEPARENT, TRACEPARENT],
        [""],
        [TRACEPARENT.upper()],
        [TRACEPARENT[:-1]],
        [f"{TRACEPARENT}-more"],
        [f"ff{TRACEPARENT[2:]}"],
        [f"00-{'0' * 32}-{PARENT}-01"],
        [f"00-{TRACE}-{'0' * 16}-01"],
        [f"00-{TRACE[:-1]}g-{PARENT}-01"],
        [f"01-{TRACE}-{PARENT}-01-{'x' * 600}"],
    ],
)
def test_a_parent_that_is_not_valid_is_ignored(sent: list[str]) -> None:
    assert trace_of(Headers(raw=[(b"traceparent", one.encode()) for one in sent])) is None


def test_a_valid_parent_is_kept_as_this_version_of_the_standard_writes_it() -> None:
    later = f"01-{TRACE}-{PARENT}-01-more"
    states = [(b"tracestate", b"a=1,b=2"), (b"tracestate", b"c=3")]
    kept = trace_of(Headers(raw=[(b"traceparent", later.encode()), *states]))
    assert kept == {"traceparent": TRACEPARENT, "tracestate": "a=1,b=2,c=3"}
    unsampled = TRACEPARENT[:-1] + "0"
    assert trace_of(Headers({"traceparent": unsampled})) == {"traceparent": unsampled}

"""A collector of spans: an HTTP server that reads what OTLP's own protobuf messages say."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span


@dataclass
class Collector:
    """What has arrived, and where to send more."""

    url: str
    bodies: list[bytes] = field(default_factory=list)
    requests: list[ExportTraceServiceRequest] = field(default_factory=list)

    def spans(self) -> list[Span]:
        """All spans in the order of their beginnings."""
        spans = [
            span
            for request in list(self.requests)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        return sorted(spans, key=lambda span: span.start_time_unix_nano)

    def job(self, job_id: str) -> Span:
        """The one span of a job, which may take a moment to arrive."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            found = [span for span in self.spans() if values(span.attributes).get("wan.job.id") == job_id]
            if found:
                [span] = found
                return span
            time.sleep(0.05)
        raise AssertionError(f"no span of {job_id} arrived")

    def phases(self, job: Span) -> list[Span]:
        """The spans below a job's."""
        return [span for span in self.spans() if span.parent_span_id == job.span_id]


def values(attributes: Sequence[KeyValue]) -> dict[str, str | int]:
    """Attributes of text and numbers by their names."""
    kinds = {"string_value": lambda value: value.string_value, "int_value": lambda value: value.int_value}
    return {each.key: kinds[each.value.WhichOneof("value") or ""](each.value) for each in attributes}


@contextlib.contextmanager
def collecting(port: int = 0) -> Iterator[Collector]:
    """A collector for a while."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            known = self.path == "/v1/traces" and self.headers["content-type"] == "application/x-protobuf"
            if known:
                collector.bodies.append(body)
                collector.requests.append(ExportTraceServiceRequest.FromString(body))
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200 if known else 404)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        collector = Collector(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()

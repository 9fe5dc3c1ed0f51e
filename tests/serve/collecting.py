"""A collector of spans: an HTTP server that reads what OTLP's own protobuf messages say."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector:
    """Runs until it is stopped, and can be started again at the same address. Keeps what has arrived."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.requests: list[ExportTraceServiceRequest] = []
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), partial(_Handler, self))
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

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


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, collector: Collector, *rest: Any) -> None:
        self.collector = collector
        super().__init__(*rest)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        known = self.path == "/v1/traces" and self.headers["content-type"] == "application/x-protobuf"
        if known:
            self.collector.bodies.append(body)
            self.collector.requests.append(ExportTraceServiceRequest.FromString(body))
        answer = ExportTraceServiceResponse().SerializeToString()
        self.send_response(200 if known else 404)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        pass

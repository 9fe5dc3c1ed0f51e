"""OpenTelemetry spans of jobs: one of each job, from its acceptance to its end, and below it one of each phase.

They are made when the job has ended, from what its row and the timeline know, so that a restart leaves nothing open.
They hold numbers and names, and neither the prompt nor an error's message, which may quote it. Only a server that was
asked for spans imports this.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence

from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import (
    INVALID_SPAN,
    Span,
    SpanKind,
    Status,
    StatusCode,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers

from .jobs import Job
from .phases import Phase

log = logging.getLogger("wan_serve")
W3C = TraceContextTextMapPropagator()
MAX_HEADER = 512  # characters, which is what W3C asks all to carry; the propagator would log each longer one


def trace_of(headers: Headers) -> Mapping[str, str] | None:
    """The trace context of a request, as it is kept with a job; None where there is none that W3C calls valid."""
    parents = headers.getlist("traceparent")
    states = ",".join(headers.getlist("tracestate"))
    if len(parents) != 1 or len(parents[0]) > MAX_HEADER:
        return None
    carrier = {"traceparent": parents[0]}
    if states and len(states) <= MAX_HEADER:
        carrier["tracestate"] = states
    context, kept = W3C.extract(carrier), dict[str, str]()
    if get_current_span(context) is INVALID_SPAN:
        return None
    W3C.inject(kept, context)  # as this version of the standard writes it
    return kept


class Spans:
    """Makes the spans of jobs that have ended. `ended` is called by the engine's thread and by requests."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("wan_runtime.serve")

    def ended(self, job: Job, phases: Sequence[Phase]) -> None:
        """A job has ended, after these phases."""
        try:
            self._write(job, phases)
        except Exception:  # a sampler of the operator's, say; no job and no server ends for it
            log.exception("the spans of %s are lost", job.id)

    def _write(self, job: Job, phases: Sequence[Phase]) -> None:
        end = max(job.completed_at or 0.0, job.created_at, *(phase.end for phase in phases))
        parent = W3C.extract(dict(job.trace or {}), Context())
        span = self._tracer.start_span(
            "job", parent, SpanKind.CONSUMER, attributes_of(job), start_time=_nanoseconds(job.created_at)
        )
        for phase in phases:
            begin = _nanoseconds(phase.begin)
            inner = self._tracer.start_span(
                phase.name, set_span_in_context(span, Context()), start_time=begin
            )
            _end(inner, phase.end, phase.error)
        _end(span, end, job.error_code)

    def close(self, seconds: float) -> None:
        """Sends what has not been sent, for so many seconds at most."""
        # the SDK's own shutdown takes no deadline, and waits for 30 s
        thread = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            log.warning("the last spans were not delivered within %.1f s, and are lost", seconds)


def attributes_of(job: Job) -> dict[str, str | int]:
    """What a job's span says of it."""
    asked = job.request
    attributes: dict[str, str | int] = {
        "wan.job.id": job.id,
        "wan.job.status": job.status,
        "wan.job.attempts": job.attempts,
        "wan.model": job.model,
        "wan.size": f"{asked['width']}x{asked['height']}",
        "wan.num_frames": int(asked["num_frames"]),
        "wan.num_inference_steps": int(asked["num_inference_steps"]),
        "wan.seed": int(asked["seed"]),
    }
    return attributes if job.owner is None else {**attributes, "wan.key.id": job.owner}


def _end(span: Span, at: float, error: str | None) -> None:
    if error is not None:
        span.set_attribute("error.type", error)
        span.set_status(Status(StatusCode.ERROR, error))
    span.end(_nanoseconds(at))


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)

"""Prometheus metrics and a JSON status for the operator, on a port of their own: counts and times, never content."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from isthmus.common.errors import PortInUseError

MAX_CONNECTIONS = 32
"""To the metrics, at a time: a scraper or two have one each, and every connection has a thread."""
SILENT_SECONDS = 10.0
"""How long a connection may take to send its request's next bytes, or to take its answer's: Prometheus' own timeout."""
OUTCOMES = ("met", "late", "refused")
"""Of a call with a deadline: computed within it, computed later, or refused, as it had not begun by then."""


class Metrics:
    """The metrics of one worker."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.sessions = Gauge("isthmus_sessions", "Open sessions.", registry=self.registry)
        self.handshakes = Counter("isthmus_handshakes", "Handshakes by outcome.", ["outcome"], registry=self.registry)
        self.calls = Counter("isthmus_calls", "Answered calls.", ["operation"], registry=self.registry)
        self.tokens = Counter("isthmus_tokens", "Token positions computed.", ["operation"], registry=self.registry)
        self.refused = Counter(
            "isthmus_refused", "Calls answered with a status instead.", ["status"], registry=self.registry
        )
        self.deadlines = Counter(
            "isthmus_deadline_calls", "Calls that had a deadline.", ["outcome"], registry=self.registry
        )
        for outcome in OUTCOMES:
            self.deadlines.labels(outcome)  # a rate needs the outcomes that are zero
        self.bytes = Counter("isthmus_bytes", "Bytes of sealed frames.", ["direction"], registry=self.registry)
        self.seconds = Histogram("isthmus_call_seconds", "Computation per call.", ["operation"], registry=self.registry)
        self.waited = Histogram(
            "isthmus_wait_seconds", "Time that a call waited for its turns.", ["priority"], registry=self.registry
        )
        self.certificate = Gauge(
            "isthmus_certificate_not_after_seconds",
            "When the worker's certificate expires, in Unix seconds.",
            registry=self.registry,
        )
        self.cached_bytes = Gauge("isthmus_stash_bytes", "Bytes of kept forward states.", registry=self.registry)
        self.evictions = Gauge(
            "isthmus_stash_evictions", "Forward states evicted since the start.", registry=self.registry
        )
        self.recomputed = Gauge("isthmus_recomputed", "Forwards computed again for a backward.", registry=self.registry)
        self.cache_bytes = Gauge("isthmus_cache_bytes", "Bytes of keys and values.", registry=self.registry)
        self.caches_evicted = Gauge(
            "isthmus_caches_evicted", "Caches of keys and values that went for others.", registry=self.registry
        )
        self.caches_lost = Gauge(
            "isthmus_caches_lost", "Decode calls that found less than they begin with.", registry=self.registry
        )

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)

    def outcomes(self) -> dict[str, int]:
        """Calls with a deadline since the worker's start, by outcome."""
        value = self.registry.get_sample_value
        return {each: int(value("isthmus_deadline_calls_total", {"outcome": each}) or 0) for each in OUTCOMES}

    def positions(self) -> float:
        """Token positions computed since the worker's start, forward, backward and decoding."""
        labels = ({"operation": operation} for operation in ("forward", "backward", "decode"))
        return sum(self.registry.get_sample_value("isthmus_tokens_total", each) or 0.0 for each in labels)


class _Merged(Collector):
    def __init__(self, texts: Mapping[str, bytes]) -> None:
        self._texts = texts

    def collect(self) -> Iterable[Metric]:
        found: dict[str, Metric] = {}
        for worker, text in self._texts.items():
            for family in text_string_to_metric_families(text.decode()):
                metric = found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    metric.samples.append(sample._replace(labels={**sample.labels, "worker": worker}))
        return found.values()


def merged(texts: Mapping[str, bytes]) -> bytes:
    """The metrics of several workers as one text, each sample with the label `worker`; of one worker unchanged."""
    if len(texts) == 1:
        return next(iter(texts.values()))
    registry = CollectorRegistry()
    registry.register(_Merged(texts))
    return generate_latest(registry)


class _QuietHandler(WSGIRequestHandler):
    timeout = SILENT_SECONDS

    def log_message(self, format: str, *args: object) -> None:
        """Requests of a scraper are not worth a line each."""


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    """A thread for each connection, so that a silent one keeps no other waiting.

    Connections beyond `MAX_CONNECTIONS` are closed.
    """

    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._room = threading.Semaphore(MAX_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print a traceback, but not of a connection that broke or fell silent."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def serve_metrics(
    host: str, port: int, metrics: Callable[[], bytes], status: Callable[[], dict[str, Any]]
) -> WSGIServer:
    """Serve `/metrics` (Prometheus) and `/status` (JSON) on daemon threads; close with `shutdown()`.

    Raises PortInUseError.
    """

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "/")
        if path == "/status":
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(status()).encode()]
        if path == "/metrics":
            start_response("200 OK", [("Content-Type", CONTENT_TYPE_LATEST)])
            return [metrics()]
        start_response("404 Not Found", [("Content-Type", "text/plain")])
        return [b"there are /metrics and /status\n"]

    try:
        server = make_server(host, port, app, _ThreadingServer, _QuietHandler)
    except OSError as error:
        raise PortInUseError(
            f"cannot serve metrics on {host}:{port} ({error.strerror}): choose another --metrics"
        ) from None
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server

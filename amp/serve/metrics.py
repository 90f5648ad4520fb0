"""Figures of the server in the text format of Prometheus."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counts requests and times them, as ASGI middleware around the application.

    Args:
        app: The application.

    Attributes:
        images: Counter of the images that were scored.
        registry: All figures, with memory and processor time of the process.
    """

    def __init__(self, app):
        self.app = app
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter("amp_requests", "Answered requests", ["path", "status"], registry=self.registry)
        self._seconds = Histogram(
            "amp_request_seconds", "Time to answer a request", ["path"], buckets=SECONDS, registry=self.registry
        )
        self._running = Gauge("amp_requests_running", "Requests that are handled or wait", registry=self.registry)
        self.images = Counter("amp_images_scored", "Images scored for a query", registry=self.registry)

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 500

        async def sending(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._running.inc()
        try:
            await self.app(scope, receive, sending)
        finally:
            self._running.dec()
            path = getattr(scope.get("route"), "path", "other")  # no path that a client invents
            self._requests.labels(path, status).inc()
            self._seconds.labels(path).observe(time.perf_counter() - begin)

    def text(self) -> bytes:
        """All figures."""
        return generate_latest(self.registry)

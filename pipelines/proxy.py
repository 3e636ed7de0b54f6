"""Front in Ray's proxy, and what it and the replicas count and log of requests.

Ray's proxies import `middlewares` from RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH. A request is told
of once: by the replica that answered it, or by the front where no replica did. This module is
imported in the proxy's process too, so it imports no torch.
"""

from __future__ import annotations

from ray.util import metrics
from starlette.middleware import Middleware

from pipelines.front import Front
from pipelines.telemetry import DRAWING_ROUTES, RequestRecord, request_logger


class Tally:
    """Counts requests that are over, for Prometheus, and logs a line for each."""

    def __init__(self) -> None:
        self.requests = metrics.Counter("jit_requests_total", "Requests answered.", ("status",))
        self.rejections = metrics.Counter(
            "jit_rejections_total", "Image requests that drew nothing, by reason.", ("reason",)
        )
        self.log = request_logger()

    def report(self, record: RequestRecord) -> None:
        """One request is over."""
        self.log.info("%s", record.line())
        self.requests.inc(tags={"status": str(record.status)})
        if record.code is not None and record.path.startswith(DRAWING_ROUTES):
            self.rejections.inc(tags={"reason": record.code})


def middlewares() -> list[Middleware]:
    """What Ray's proxy asks for."""
    return [Middleware(Front, report=Tally().report)]

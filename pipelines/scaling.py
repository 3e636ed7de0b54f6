"""How many replicas of the server are wanted: as many as have slots for the images that are asked.

Ray Serve's controller imports this module, so it imports neither torch nor Ray.
"""

from __future__ import annotations

import math
from typing import Any

IMAGES = "images"
"""What a replica reports of itself: images that it draws and that wait in its queue, and at least
one more than its slots while it refuses some."""
POLICY = "pipelines.scaling:by_images"


def by_images(context: Any) -> tuple[int, dict[str, Any]]:
    """Replicas for all images in work and in queues, at target_ongoing_requests images each.

    Ray's own policy counts requests: a queue that sixteen of sixteen images have filled would look
    idle beside one of seventy single images.

    Args:
        context: Ray Serve's AutoscalingContext.
    """
    reported = (context.aggregated_metrics or {}).get(IMAGES, {})
    return math.ceil(sum(reported.values()) / context.config.target_ongoing_requests), {}

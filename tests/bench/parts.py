"""The parts of a benchmark that are wanted."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def chosen(parts: dict[str, Callable[[], dict]]) -> list[Callable[[], dict]]:
    """Those that PARTS names, separated by blanks; all, where it names none."""
    wanted = os.environ.get("PARTS", "").split() or list(parts)
    for name in wanted:
        if name not in parts:
            sys.exit(f"PARTS names {name!r}: choose from {', '.join(parts)}")
    return [parts[name] for name in wanted]

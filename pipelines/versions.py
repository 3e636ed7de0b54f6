"""Versions of the tools that decide numbers and files, for everything that is published."""

from __future__ import annotations

import platform
from importlib import metadata

TOOLS = ("jit-on-ray", "torch", "ray", "numpy", "pyarrow", "pillow")


def tool_versions() -> dict[str, str]:
    """Tool -> installed version."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in TOOLS}}

"""Processes that a test started, for those tests that kill them."""

from __future__ import annotations

from pathlib import Path


def descendants(pid: int, name: str = "") -> dict[int, str]:
    """Processes that `pid` started, directly or not, with their command lines.

    Args:
        pid: of the process above them; it is not among them.
        name: part of the command line of those that are wanted.
    """
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(entry.name))
    found: dict[int, str] = {}
    todo = [pid]
    while todo:
        for child in children.get(todo.pop(), []):
            try:
                found[child] = Path("/proc", str(child), "cmdline").read_text()
            except OSError:
                continue
            todo.append(child)
    return {child: line for child, line in found.items() if name in line}

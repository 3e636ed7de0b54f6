"""`make bench [WHAT=model]`: ratios side by side in one process, medians, a table and JSON.

Times alternate between the two sides, round after round, so that a slow minute of the machine
slows both; a ratio is the median of the ratios of the rounds.
"""

from __future__ import annotations

import importlib
import json
import platform
import sys
from pathlib import Path

from jitmodel.benchmark import table

SUBJECTS = ("model", "prepare", "loader", "fit", "memory", "shuffle", "evaluate", "serve")


def main() -> None:
    wanted = sys.argv[1:] or list(SUBJECTS)
    for subject in set(wanted) - set(SUBJECTS):
        sys.exit(f"unknown benchmark {subject!r}: choose from {', '.join(SUBJECTS)}")
    folder = Path("bench")
    folder.mkdir(exist_ok=True)
    for subject in wanted:
        try:
            result = importlib.import_module(subject).run()  # a neighbour of this file
        except SystemExit as why:
            if len(wanted) == 1:
                raise
            print(f"{subject} is left out: {why}\n", flush=True)
            continue
        result["machine"] = {"processor": processor(), "python": platform.python_version()}
        (folder / f"{subject}.json").write_text(json.dumps(result, indent=2) + "\n")
        for part in result.get("tables", [result]):
            print(f"{part['title']}\n\n{table(part['rows'])}\n", flush=True)
        print(f"written to {folder / subject}.json\n")


def processor() -> str:
    """Model name of the processor, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((s.partition(": ")[2] for s in lines if s.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()

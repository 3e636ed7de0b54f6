"""The import rules cover every module: a new one cannot slip past them."""

import tomllib
from pathlib import Path

MAY_IMPORT_RAY = {
    "prepare", "train", "evaluate", "sweep", "serve", "replica", "deploy", "proxy", "runtime",
    "pool",
}  # fmt: skip


def test_every_module_of_pipelines_is_a_leaf_or_may_import_ray(repository: Path):
    settings = tomllib.loads((repository / "pyproject.toml").read_text())
    contracts = settings["tool"]["importlinter"]["contracts"]
    rule = next(c for c in contracts if c["name"].startswith("leaves never import a room"))
    files = {path.stem for path in (repository / "pipelines").glob("*.py")} - {"__init__"}

    assert set(rule["source_modules"]) == {f"pipelines.{name}" for name in files - MAY_IMPORT_RAY}
    assert set(rule["forbidden_modules"]) == {f"pipelines.{name}" for name in MAY_IMPORT_RAY}

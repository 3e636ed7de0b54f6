"""The run-book's commands exist and would be understood."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from ray.scripts.scripts import cli as ray_cli

from pipelines import cli


@pytest.fixture(scope="module")
def commands(repository: Path) -> list[list[str]]:
    text = (repository / "cluster" / "README.md").read_text().replace("\\\n", " ")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line.strip()]


def test_every_stage_of_the_run_book_is_parsed_by_the_command_line(commands: list[list[str]]):
    stages = set()
    for program, word, *rest in commands:
        if program == "jit":
            assert word == "submit"
            stage, *options = [w for i, w in enumerate(rest) if i or w != "--no-wait"]
            cli.resolve(stage, options)
            stages.add(stage)
    assert {"prepare", "train", "export", "reference", "evaluate", "serve"} <= stages


def test_every_ray_command_of_the_run_book_exists_with_its_options(commands: list[list[str]]):
    used = set()
    for program, word, *rest in commands:
        if program == "ray":
            command = ray_cli.commands[word]
            while hasattr(command, "commands"):  # such as `ray job list`
                command, rest = command.commands[rest[0]], rest[1:]
            known = {option for parameter in command.params for option in parameter.opts}
            assert {w for w in rest if w.startswith("-")} <= known, (word, rest)
            used.add(word)
    assert {"up", "down", "dashboard", "exec", "job", "get-auth-token"} <= used

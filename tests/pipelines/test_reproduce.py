"""`jit reproduce`: every line that it prints is one that `jit` takes."""

from __future__ import annotations

import shlex

import pytest

from pipelines import cli
from pipelines.config import ReproduceConfig, SweepConfig, TrainConfig
from pipelines.reproduce import EPOCH, lines, read_recipes, run


@pytest.mark.parametrize("name", read_recipes())
def test_every_line_of_a_table_is_one_that_jit_takes(name: str):
    recipe = read_recipes()[name]
    commands = [shlex.split(line) for line in lines(recipe, "s3://b", 16) if line.startswith("jit")]
    configs = [cli.resolve(words[1], words[2:]) for words in commands]

    trained = [config for config in configs if isinstance(config, TrainConfig)]
    judged = [config for config in configs if isinstance(config, SweepConfig)]
    assert [t.total_images for t in trained] == [run.epochs * EPOCH for run in recipe.runs]
    assert {t.workers for t in trained} == {"16"}
    assert [s.model for s in judged] == [f"s3://b/runs/{t.name}" for t in trained]
    written = {config.output for config in configs if hasattr(config, "output")}
    assert {s.reference for s in judged} | {t.data for t in trained} <= written
    for config in trained:
        assert config.data == f"s3://b/imagenet-{config.model.image_size}"
        assert config.flow.noise_scale == config.model.image_size / 256


def test_no_name_lists_the_tables_and_a_wrong_one_is_refused(capsys: pytest.CaptureFixture[str]):
    run(ReproduceConfig())
    assert "table-6-256  Table 6, four sizes at 256 pixels" in capsys.readouterr().out

    assert cli.main(["reproduce", "table-7"]) == 2
    assert "choose from table-5, table-6-256" in capsys.readouterr().err

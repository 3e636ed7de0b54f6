"""One command line: quick help, presets and overrides, exit codes."""

import subprocess
import sys

import pytest

from pipelines import cli
from pipelines.config import PrepareConfig, TrainConfig, load_preset, preset_names

REQUIRED = {
    "prepare": ["demo", "imagenet-256", "imagenet-512"],
    "train": ["demo", *[f"jit-{s}{p}" for s in "blhg" for p in ("16-256", "32-512")]],
    "evaluate": ["demo", "fid-50k"],
    "sweep": ["demo", "fid-50k"],
    "serve": ["demo"], "reference": ["demo"], "export": ["demo"],
}  # fmt: skip


@pytest.mark.parametrize("stage", [None, *cli.STAGES])
def test_help_loads_neither_torch_nor_ray_and_so_comes_at_once(stage):
    line = [*([stage] if stage else []), "--help"]
    program = f"""
import sys
from pipelines.cli import main
try:
    code = main({line!r})
except SystemExit as stop:
    code = stop.code
loaded = [m for m in ("torch", "ray", "numpy") if m in sys.modules]
sys.exit(f"loaded {{loaded}}" if loaded else code)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert found.returncode == 0, found.stderr
    assert "usage: jit" in found.stdout


@pytest.mark.parametrize("stage", REQUIRED)
def test_presets_that_people_script_against_exist_and_are_valid(stage):
    assert set(REQUIRED[stage]) <= set(preset_names(stage))
    for name in preset_names(stage):
        load_preset(stage, name, cli.STAGES[stage].config)


def test_a_preset_then_options_make_one_config():
    line = ["demo", "--model.depth", "3", "--optimizer.ema-decays", "0.5", "0.995", "--dry-run"]
    config = cli.resolve("train", line)

    assert isinstance(config, TrainConfig)
    assert (config.model.depth, config.model.hidden_size) == (3, 192)
    assert config.optimizer.ema_decays == (0.5, 0.995)
    assert config.dry_run


def test_the_first_word_of_a_stage_with_a_uri_is_the_uri_and_the_next_a_preset():
    config = cli.resolve("export", ["s3://b/run", "demo", "--output", "x"])
    assert (config.source, config.output, config.ema) == ("s3://b/run", "x", 0.995)
    assert cli.resolve("export", ["s3://b/run"]).ema == 0.9999


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["prepair"], "unknown stage 'prepair'"),
        (["train", "jit-x16-256"], "unknown preset 'jit-x16-256' for `jit train`: choose from"),
        (["prepare", "demo"], "--source is missing"),
        (["export"], "--source is missing"),
        (["prepare", "demo", "--source", "/a/\udcff"], "error: /a/\\xff is not UTF-8: rename it"),
        (["prepare", "--source=\udcff", "--output", "/tmp/n"], "--source=\\xff is not UTF-8"),
        (["train", "demo", "--storage", "/tmp/\udcff"], "/tmp/\\xff is not UTF-8"),
        (["export", "/nowhere", "--output", "/tmp/never"], "/nowhere"),
        (["prepare", "demo", "--source", "/nowhere", "--output", "/tmp/never"], "/nowhere"),
        (["train", "demo", "--data", "/nowhere", "--storage", "/tmp/n", "--name", "n"],
         "no manifest at /nowhere"),
        (["serve", "/nowhere"], "no file or folder at /nowhere"),
        (["train", "demo", "--model.depth", "-1"], "--model.depth -1: Input should be greater"),
        (["train", "--model.patch-size", "5"], "patch_size 5 does not divide image_size 256\n"),
        (["train", "demo", "--workers", "3"], "loader.lanes 16 cannot be dealt evenly to 3 work"),
        (["evaluate", "--num-images", "-5", "--batch", "0"],
         "--num-images -5: Input should be greater than 0; --batch 0: Input should be"),
        (["evaluate", "--sampler.cfg-interval", "0.5", "0.2"],
         "--sampler.cfg-interval (0.5, 0.2): the interval 0.5 0.2 is not 0 <= low < high <= 1\n"),
        (["evaluate", "--resize-to", "100000"], "--resize-to 100000: Input should be less than"),
    ],
)  # fmt: skip
def test_bad_usage_is_one_line_and_code_2(line, message, capsys):
    assert cli.main(line) == 2
    found = capsys.readouterr().err
    assert found.startswith("error: ")
    assert message in found
    assert "Traceback" not in found
    assert "pydantic" not in found


@pytest.mark.parametrize(
    "line",
    [
        ["train", "demo", "--model.dept", "3"],
        ["prepare", "--image-size", "many"],
        ["demo", "--precision", "fp64"],
    ],
)
def test_options_that_do_not_exist_or_do_not_fit_end_with_code_2(line, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(line)
    assert stop.value.code == 2
    option = line[-2].rpartition(".")[2].removeprefix("--")
    assert option in capsys.readouterr().err.replace("_", "-")


@pytest.mark.parametrize("module", [*cli.STAGES])
def test_a_stage_is_also_a_module(module):
    line = [sys.executable, "-X", "importtime", "-m", f"pipelines.{module}", "--help"]
    found = subprocess.run(line, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    loaded = {row.rpartition("|")[2].strip() for row in found.stderr.splitlines()}
    assert "tyro" in loaded
    assert not loaded & {"torch", "ray"}
    assert found.stdout.startswith(f"usage: jit {module}")


def test_defaults_are_the_papers_recipe():
    train, prepare = TrainConfig(), PrepareConfig()
    assert (train.global_batch, train.optimizer.learning_rate) == (1024, 2e-4)
    assert train.optimizer.ema_decays == (0.9996, 0.9998, 0.9999)
    assert (train.flow.p_mean, train.flow.p_std, train.flow.label_drop) == (-0.8, 0.8, 0.1)
    assert (train.sampler.steps, train.sampler.solver) == (50, "heun")
    assert prepare.image_size == (256,)

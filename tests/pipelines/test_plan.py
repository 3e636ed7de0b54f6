"""`jit plan`: what a run needs, from arithmetic and a price list."""

import re
import subprocess
import sys
from importlib import resources

import pytest
import yaml

from jitmodel import cost
from pipelines import cli, plan
from pipelines.config import PlanConfig, load_preset, preset_names


def planned(preset: str, **changes) -> plan.Plan:
    base = load_preset("train", preset, PlanConfig)
    config = PlanConfig.model_validate(base.model_dump() | changes)
    return plan.plan(config, plan.read_prices(config.prices))


def test_steps_days_and_price_follow_from_each_other():
    found = planned("jit-b16-256", gpus=16, mfu=0.5)

    assert (found.machines, found.micro_batch, found.accumulation) == (2, 64, 1)
    assert found.steps == -(-600 * 1_281_167 // 1024)
    # 16 x 989 TFLOP/s x 0.5 over 151 GFLOP an image.
    assert found.images_per_s == pytest.approx(16 * 989e12 * 0.5 / 151.3e9, rel=1e-3)
    assert found.days == pytest.approx(768_700_200 / found.images_per_s / 86_400)
    assert found.price == pytest.approx(found.days * 24 * 2 * 55.04)


def test_training_state_takes_28_bytes_a_parameter_with_three_averages():
    config = load_preset("train", "jit-g16-256", PlanConfig)
    parameters = cost.num_parameters(config.model)

    alone = planned("jit-g16-256", gpus=1).memory
    eight = planned("jit-g16-256", gpus=8).memory
    nodes = planned("jit-g16-256", gpus=64, parallel={"shard_size": 8}).memory

    state = alone.weights + alone.gradients + alone.optimizer + alone.averages
    assert state == 28 * parameters
    assert 56e9 < state < 57e9
    assert eight.weights * 8 == pytest.approx(alone.weights, rel=1e-6)
    assert nodes.weights == eight.weights  # whole copies on every node
    assert planned("jit-g16-256", parallel={"ema_on_cpu": True}).memory.averages == 0


def test_main_memory_holds_the_copy_that_is_stored_and_averages_that_are_kept_there():
    config = load_preset("train", "jit-g16-256", PlanConfig)
    parameters = cost.num_parameters(config.model)

    there = planned("jit-g16-256", gpus=8).memory.host
    averaged = planned("jit-g16-256", gpus=8, parallel={"ema_on_cpu": True}).memory.host

    assert there * 8 == pytest.approx(24 * parameters, rel=1e-6)  # weights, AdamW, three EMAs
    assert averaged * 8 == pytest.approx(40 * parameters, rel=1e-6)  # EMAs, and weights they follow


def test_a_judge_that_is_slower_than_checkpoints_come_is_named_before_the_start():
    base = load_preset("train", "jit-g16-256", PlanConfig).model_dump()
    judged = {"validation": {"reference": "r.npz", "num_images": 5000}}
    prices = plan.read_prices("")

    def said(**changes) -> str:
        config = PlanConfig.model_validate(base | judged | changes)
        return plan.describe(config, plan.plan(config, prices), prices)

    # 5000 images, at most 200 passes of 767.5 GFLOP, at 40 % of 989 TFLOP/s.
    assert "judging     at most 32.3 min a checkpoint on one H100 more (5,000 images)" in said(
        gpus=16
    )
    assert "MORE than that" in said(gpus=16)
    assert "MORE than that" not in said(gpus=16, checkpoint_every_images=100_000_000)
    assert "judging" not in said(gpus=16, validation={})


def test_what_saves_memory_is_seen_to_save_it():
    def peak(**parallel) -> int:
        return planned("jit-h16-256", micro_batch=64, parallel=parallel).memory.peak

    everything = {"compile": True}
    assert (
        peak(**everything, checkpointing="full")
        < peak(**everything, checkpointing="selective")
        < peak(**everything)
        < peak(compile=False)
    )
    assert peak(**everything) < peak(**everything, reshard_after_forward=False)


def test_a_plan_says_whether_it_fits_and_what_would(capsys):
    line = ["plan", "jit-g16-256", "--instance", "p4d.24xlarge", "--micro-batch", "128"]

    assert cli.main(line) == 0

    text = capsys.readouterr().out
    assert "2,007.1 M parameters" in text
    assert "767.5 GFLOP forward" in text
    assert "multiply-adds: 383.7" in text
    assert "DOES NOT FIT; up to " in text
    largest = int(text.partition("DOES NOT FIT; up to ")[2].split()[0])
    assert planned("jit-g16-256", micro_batch=largest).gb_per_gpu <= 40
    assert planned("jit-g16-256", micro_batch=largest + 1, global_batch=8 * (largest + 1) * 64,
                   ).gb_per_gpu > 40  # fmt: skip


def test_what_a_plan_says_would_fit_is_a_micro_batch_that_training_accepts():
    uneven = {"instance": "p4d.24xlarge", "global_batch": 960}  # 8 shares of 120 images
    largest = planned("jit-g16-256", micro_batch=60, **uneven).largest_micro_batch

    assert largest == 30  # 32 would fit too, and do not divide 120
    assert planned("jit-g16-256", micro_batch=largest, **uneven).gb_per_gpu <= 40


@pytest.mark.parametrize("preset", preset_names("train"))
def test_every_preset_can_be_planned(preset):
    found = planned(preset)

    assert found.gb_per_gpu < found.instance.memory_gb
    assert found.largest_micro_batch >= found.micro_batch


@pytest.mark.parametrize("preset", [n for n in preset_names("train") if n != "demo"])
def test_the_hours_in_a_presets_header_are_the_plans(preset):
    header = (resources.files("pipelines") / "presets" / "train" / f"{preset}.yaml").read_text()
    said = re.search(r"# Hours:\s+(\d+) on 8 H100", header)

    assert said is not None
    assert int(said[1]) == round(planned(preset, gpus=8, instance="p5.48xlarge").days * 24)


def test_people_may_bring_their_own_machines_and_prices(tmp_path, capsys):
    own = {
        "as_of": "today", "source": "a contract", "currency": "EUR",
        "instances": {"box": {"gpus": 2, "device": "H100", "memory_gb": 80, "per_hour": 3.0}},
    }  # fmt: skip
    file = tmp_path / "prices.yaml"
    file.write_text(yaml.safe_dump(own))

    assert cli.main(["plan", "jit-b16-256", "--instance", "box", "--prices", str(file)]) == 0

    text = capsys.readouterr().out
    assert "4 x box = 8 x H100" in text
    assert "EUR at 3 an hour and machine, training alone (a contract; as of today)" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--instance", "t2.micro"], "no price for --instance 't2.micro': choose from p6-b200"),
        (["--prices", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--prices", "/"], "/ is no price list like pipelines/prices.yaml"),
        (["--gpus", "7"], "64 cannot be dealt evenly to 7"),
        (["--gpus", "16", "--parallel.shard-size", "5"], "shard_size 5 does not divide 16"),
        (["--mfu", "1.5"], "mfu"),
        (["--workers", "16"], "use --gpus 16"),
        (["--workers", "2:16"], "use --gpus 16"),
        (["--validation.patience", "5"], "without validation.reference no checkpoint is judged"),
    ],
)
def test_what_cannot_be_planned_is_one_line_and_code_2(options, message, capsys):
    assert cli.main(["plan", "jit-b16-256", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_gpus_take_the_place_of_the_presets_workers():
    config = cli.resolve("plan", ["jit-b16-256", "--gpus", "16", "--parallel.shard-size", "16"])

    assert isinstance(config, PlanConfig)
    assert config.world_sizes == [16]


def test_a_file_that_is_no_price_list_is_named(tmp_path, capsys):
    file = tmp_path / "prices.yaml"
    file.write_text("instances: {box: {gpus: 0}}")

    assert cli.main(["plan", "jit-b16-256", "--prices", str(file)]) == 2

    assert "prices.yaml is no price list" in capsys.readouterr().err


def test_a_plan_needs_neither_torch_nor_ray():
    program = """
import sys
from pipelines.cli import main
code = main(["plan", "jit-l16-256", "--gpus", "32"])
sys.exit(code or str({"torch", "ray", "numpy"} & set(sys.modules)) != "set()")
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0

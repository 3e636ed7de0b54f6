"""Sharding, replicas, recomputation: none of them may change what is trained."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.utils.flop_counter import FlopCounterMode

from jitmodel.config import ModelConfig, OptimizerConfig
from jitmodel.model import JiT
from jitmodel.parallel import device_mesh, parallelize
from jitmodel.state import Batch, TrainState
from pipelines import ports
from tests.distances import assert_trained_alike, moved_apart

MODEL = ModelConfig(  # SwiGLU's true width, 106, is padded inside
    image_size=16, patch_size=4, hidden_size=40, depth=3, num_heads=2, bottleneck_dim=8,
    in_context_len=4, in_context_start=1, num_classes=10,
)  # fmt: skip
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-3, warmup_images=16, ema_decays=(0.5, 0.9), grad_clip=0.3
)
STEPS, BATCH = 10, 16
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

RANK = """
import json, os, sys
import torch, torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor
from jitmodel.config import ModelConfig, OptimizerConfig
from jitmodel.model import JiT
from jitmodel.parallel import device_mesh, parallelize
from jitmodel.state import Batch, TrainState

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
plan = json.loads(sys.argv[1])
pixels = torch.load(plan["pixels"])
for folder, options in plan["runs"].items():
    with torch.device("meta"):
        model = JiT(ModelConfig.model_validate(plan["model"]))
    mesh = device_mesh("cpu", world, options.pop("shard_size", 0))
    pieces, on_cpu = options.pop("pieces", 1), options.pop("ema_on_cpu", False)
    parallelize(model, mesh, **options)
    model.to_empty(device="cpu")
    model.init_weights(torch.Generator().manual_seed(0))
    first = {n: p.full_tensor().detach().clone() for n, p in model.named_parameters()}
    held = sum(p.to_local().numel() for p in model.parameters())
    state = TrainState(
        model, OptimizerConfig.model_validate(plan["optimizer"]), total_images=1000,
        precision=options.get("precision", "fp32"), ema_on_cpu=on_cpu,
    )
    results = []
    for step in range(plan["steps"]):
        index = torch.arange(step * plan["batch"] + rank, (step + 1) * plan["batch"], world)
        batches = [Batch(pixels[i], i % 10, i) for i in index.chunk(pieces)]
        result = state.step(batches)
        results.append((result.loss.item(), result.grad_norm.item()))
    dcp_save(state.state_dict(), checkpoint_id=folder)
    if rank == 0:
        torch.save({"first": first, "results": results, "held": held}, folder + "/rank0.pt")
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # see the same line in tests/pipelines/runs.py
"""


def pixels() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (200, 3, 16, 16), dtype=torch.uint8, generator=generator)


def run_on_ranks(world: int, port: int, folder: Path, runs: dict[str, dict]) -> dict[str, dict]:
    """Train on gloo processes; what rank 0 saw of each run, and its whole checkpoint."""
    torch.save(pixels(), folder / "pixels.pt")
    plan = {
        "pixels": str(folder / "pixels.pt"), "model": MODEL.model_dump(), "steps": STEPS,
        "optimizer": OPTIMIZER.model_dump(), "batch": BATCH,
        "runs": {str(folder / name): options for name, options in runs.items()},
    }  # fmt: skip
    where = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, json.dumps(plan)],
            env=os.environ | where | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, "\n".join(outputs)
    found = {}
    for name in runs:
        found[name] = torch.load(folder / name / "rank0.pt")
        state = alone(steps=0).state_dict()
        dcp_load(state, storage_reader=FileSystemReader(folder / name), no_dist=True)
        found[name] |= {"state": state, "folder": folder / name}
    return found


def alone(
    steps: int = STEPS, precision: str = "fp32", config: ModelConfig = MODEL, **options
) -> TrainState:
    """The same run in one process; `results` is what its steps said."""
    model = JiT(config, generator=torch.Generator().manual_seed(0))
    parallelize(model, **options)
    state = TrainState(model, OPTIMIZER, total_images=1000, precision=precision)
    state.results = []
    for step in range(steps):
        index = torch.arange(step * BATCH, (step + 1) * BATCH)
        result = state.step([Batch(pixels()[index], index % 10, index)])
        state.results.append((result.loss.item(), result.grad_norm.item()))
    return state


def flat(tree: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    found = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            found[prefix + name] = value
    return found


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory) -> dict[str, dict]:
    """Runs on four processes, in one start of them."""
    runs = {
        "sharded": {"ema_on_cpu": True},
        "replicas": {"shard_size": 2, "pieces": 2, "reshard_after_forward": False},
        "replicas in bf16": {"shard_size": 2, "pieces": 2, "precision": "bf16"},
    }
    return run_on_ranks(4, ports.free_port(), tmp_path_factory.mktemp("ranks"), runs)


@pytest.mark.parametrize("name", ["sharded", "replicas"])
def test_four_ranks_train_what_one_process_trains(four_ranks, name):
    expected, found = alone(), four_ranks[name]

    for (loss, norm), (loss_alone, norm_alone) in zip(
        found["results"], expected.results, strict=True
    ):
        assert loss == pytest.approx(loss_alone, rel=1e-5)
        assert norm == pytest.approx(norm_alone, rel=1e-4)
    assert any(norm > OPTIMIZER.grad_clip for _, norm in expected.results)  # clipping has acted
    here, there = flat(found["state"]), flat(expected.state_dict())
    assert {name.split(".")[0] for name in there} >= {"model", "ema", "optimizer"}
    assert_trained_alike(here, there, found["first"])


@pytest.mark.parametrize("name", ["sharded", "replicas"])
def test_initial_weights_are_the_same_bits_for_any_number_of_ranks(four_ranks, name):
    whole = JiT(MODEL, generator=torch.Generator().manual_seed(0))

    first = four_ranks[name]["first"]

    assert first.keys() == dict(whole.named_parameters()).keys()
    assert all(torch.equal(first[n], p) for n, p in whole.named_parameters())


@pytest.mark.parametrize(("name", "share"), [("sharded", 4), ("replicas", 2)])
def test_a_rank_holds_its_shard_and_no_more(four_ranks, name, share):
    whole = sum(p.numel() for p in JiT(MODEL).parameters())

    assert whole / share <= four_ranks[name]["held"] < 1.1 * whole / share


def test_weights_gathered_in_bf16_train_as_bf16_autocast_does(four_ranks):
    exact = [loss for loss, _ in alone().results]
    autocast = [loss for loss, _ in alone(precision="bf16").results]

    gathered = [loss for loss, _ in four_ranks["replicas in bf16"]["results"]]

    assert gathered != autocast  # norm weights are rounded as well
    assert gathered == pytest.approx(autocast, rel=5e-3)
    assert gathered == pytest.approx(exact, rel=1e-2)
    for key, tensor in flat(four_ranks["replicas in bf16"]["state"]).items():
        if tensor.is_floating_point():
            assert tensor.dtype == torch.float32, key


def test_sharded_checkpoints_hold_the_true_width_of_the_mlp(four_ranks):
    reader = FileSystemReader(four_ranks["replicas"]["folder"])
    sizes = {n: tuple(m.size) for n, m in reader.read_metadata().state_dict_metadata.items()
             if "blocks.0.mlp.w12.weight" in n and not n.endswith(".step")}  # fmt: skip

    assert len(sizes) == 5  # weights, two EMAs, two moments
    assert set(sizes.values()) == {(2 * 106, 40)}


@pytest.mark.slow
def test_sharding_recomputing_and_compiling_together_change_no_step(tmp_path, free_port):
    runs = {"all": {"checkpointing": "selective", "compile": True, "pieces": 2}}
    found = run_on_ranks(2, free_port, tmp_path, runs)["all"]
    expected = alone()

    assert [loss for loss, _ in found["results"]] == pytest.approx(
        [loss for loss, _ in expected.results], rel=1e-5
    )
    worst = moved_apart(flat(found["state"]), flat(expected.state_dict()), found["first"])
    assert max(worst.values()) < 1e-4, worst


def test_a_shard_size_that_does_not_divide_the_ranks_is_refused():
    with pytest.raises(ValueError, match="shard_size 3 does not divide 8"):
        device_mesh("cpu", 8, 3)
    assert device_mesh("cpu", 1, 8) is None


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_recomputing_and_compiling_change_no_step(checkpointing, compile):
    config = MODEL.model_copy(update={"depth": 4, "dropout": 0.2})
    plain = alone(3, config=config)
    other = alone(3, config=config, checkpointing=checkpointing, compile=compile)

    for (loss, norm), (expected, expected_norm) in zip(other.results, plain.results, strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)
    first = dict(JiT(config, generator=torch.Generator().manual_seed(0)).named_parameters())
    worst = moved_apart(flat(other.state_dict()), flat(plain.state_dict()), first)
    assert max(worst.values()) < 1e-4, worst


def test_full_recomputation_runs_the_forward_pass_again_and_selective_no_product_of_it():
    flops = {}
    for checkpointing in ("none", "selective", "full"):
        model = JiT(MODEL, generator=torch.Generator().manual_seed(0))
        parallelize(model, checkpointing=checkpointing)
        with FlopCounterMode(display=False) as forward:
            x = model(torch.randn(4, 3, 16, 16), torch.full((4,), 0.5), torch.arange(4))
        with FlopCounterMode(display=False) as backward:
            x.square().sum().backward()
        flops[checkpointing] = forward.get_total_flops(), backward.get_total_flops()

    assert len({forward for forward, _ in flops.values()}) == 1
    assert flops["selective"] == flops["none"]
    again = flops["full"][1] - flops["none"][1]
    assert 0.9 * flops["none"][0] < again < flops["none"][0]  # the blocks' part of it


FAULTS = """
import resource, torch
import numpy as np
from jitmodel.parallel import tune_cpu

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [np.ones(24 << 20, np.uint8) for _ in range(10)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

tune_cpu(threads=1)
assert torch.get_num_threads() == 1
print(faults(), faults(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told")
def test_memory_that_was_freed_is_used_again_without_the_kernel():
    command = [sys.executable, "-c", FAULTS]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    first, second, third = map(int, printed.split())
    assert second + third < first / 100

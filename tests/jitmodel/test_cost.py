"""Arithmetic about a model against the model itself, and against the paper."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from jitmodel import cost
from jitmodel.config import ModelConfig
from jitmodel.model import JiT


@pytest.mark.parametrize("size", ["B/16", "L/16", "H/16", "G/16"])
def test_parameters_and_operations_are_those_of_the_network(size):
    config = ModelConfig.named(f"JiT-{size}", num_classes=7)
    with torch.device("meta"):
        model = JiT(config)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(2, 3, 256, 256), torch.empty(2), torch.empty(2, dtype=torch.int64))
    blocks = sum(p.numel() for p in model.blocks.parameters())

    assert cost.num_parameters(config) == sum(p.numel() for p in model.parameters())
    assert cost.block_parameters(config) * config.depth == blocks
    padded = counter.get_total_flops() / 2 / cost.forward_flops(config)
    assert 1 <= padded < 1.01  # zeros of SwiGLU's padding are multiplied, but no use


@pytest.mark.parametrize(
    ("size", "image_size", "parameters_in_millions", "giga_multiply_adds"),
    [
        ("B/16", 256, 131, 25), ("L/16", 256, 459, 88), ("H/16", 256, 953, 182),
        ("G/16", 256, 2007, 384), ("B/32", 512, 133, 26), ("L/32", 512, 462, 89),
        ("H/32", 512, 956, 183), ("B/64", 1024, 141, 28),
    ],
)  # fmt: skip
def test_the_papers_gflops_are_multiply_adds_so_half_of_ours(
    size, image_size, parameters_in_millions, giga_multiply_adds
):
    """Table 9; for G the paper says "2B" and 383, for B/64 30, where a count gives 384 and 28."""
    config = ModelConfig.named(f"JiT-{size}", image_size=image_size)

    assert round(cost.num_parameters(config) / 1e6) == parameters_in_millions
    assert round(cost.forward_flops(config) / 2e9) == giga_multiply_adds
    assert cost.train_flops(config) == 3 * cost.forward_flops(config)


def test_peaks_are_found_by_the_name_that_the_driver_gives():
    assert cost.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert cost.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert cost.peak_flops("NVIDIA L40S") == 362e12
    assert cost.peak_flops("AMD EPYC") is None
    assert cost.peak_flops("NVIDIA L40") is None  # neither an L4 nor an L40S


def test_the_arithmetic_needs_no_torch():
    program = "import sys, jitmodel.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (  # mostly activations
            {"hidden_size": 384, "depth": 4, "num_heads": 6, "in_context_start": 2},
            {"micro_batch": 12, "num_emas": 2},
        ),
        pytest.param(
            {"hidden_size": 384, "depth": 6, "num_heads": 6, "in_context_start": 2},
            {"micro_batch": 12, "num_emas": 1, "checkpointing": "selective"},
            marks=pytest.mark.slow,
        ),
        pytest.param(  # mostly weights and what follows them, with gradients that wait
            {"hidden_size": 768, "depth": 4, "num_heads": 12, "in_context_start": 2,
             "image_size": 128},
            {"micro_batch": 4, "pieces": 2, "precision": "fp32"},
            marks=pytest.mark.slow,
        ),
        (
            {"hidden_size": 768, "depth": 6, "num_heads": 12, "in_context_start": 2,
             "image_size": 128},
            {"micro_batch": 8, "checkpointing": "full", "world": 2},
        ),
    ],
)  # fmt: skip
def test_planned_memory_is_the_measured_peak_to_15_percent(measure_memory, model, options):
    for rank in measure_memory(model | {"num_classes": 10}, **options):
        assert rank["plan"] > 250e6  # more than noise
        assert rank["peak"] == pytest.approx(rank["plan"], rel=0.15)


@pytest.mark.slow
def test_planned_main_memory_is_what_storing_a_checkpoint_adds_to_15_percent(
    measure_memory, tmp_path
):
    """On a CPU the copy that is stored lies beside what trains."""
    model = {"hidden_size": 768, "depth": 6, "num_heads": 12, "in_context_start": 2,
             "image_size": 128, "num_classes": 10}  # fmt: skip
    for rank in measure_memory(model, micro_batch=8, world=2, folder=str(tmp_path)):
        assert rank["parts"]["host"] > 500e6
        assert rank["peak"] == pytest.approx(rank["plan"], rel=0.15)


@pytest.fixture
def measure_memory(monkeypatch):
    """What tests/bench/memory.py measures in processes of its own."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench")
    return importlib.import_module("memory").measure

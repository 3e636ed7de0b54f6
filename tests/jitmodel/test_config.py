"""Configs name the paper's models and refuse contradictions."""

import pytest
import torch
from pydantic import ValidationError

from jitmodel.config import FlowConfig, ModelConfig, OptimizerConfig, SamplerConfig
from jitmodel.model import JiT


def parameters_in_millions(config):
    with torch.device("meta"):
        model = JiT(config)
    return sum(p.numel() for p in model.parameters()) / 1e6


@pytest.mark.parametrize(
    ("name", "image_size", "millions"),
    [
        ("JiT-B/16", 256, 131), ("JiT-L/16", 256, 459), ("JiT-H/16", 256, 953),
        ("JiT-B/32", 512, 133), ("JiT-L/32", 512, 462), ("JiT-H/32", 512, 956),
        ("JiT-B/64", 1024, 141),
    ],
)  # fmt: skip
def test_trainable_parameters_are_as_many_as_the_papers(name, image_size, millions):
    assert round(parameters_in_millions(ModelConfig.named(name, image_size=image_size))) == millions


@pytest.mark.parametrize("patch", [16, 32])
def test_the_giant_has_two_billion_parameters(patch):
    config = ModelConfig.named(f"JiT-G/{patch}", image_size=16 * patch)
    assert round(parameters_in_millions(config) / 1000) == 2


def test_dropout_lies_in_the_middle_half_of_the_blocks():
    giant = ModelConfig.named("JiT-G/16")
    assert [i for i in range(giant.depth) if giant.has_dropout(i)] == list(range(10, 30))
    assert giant.dropout == 0.2
    assert [giant.mlp_dim, ModelConfig.named("JiT-H/16").mlp_dim] == [4437, 3413]


@pytest.mark.parametrize("name", ["JiT-B", "JiT-X/16", "JiT-B/8", "B/16", "JiT-B/16/16", ""])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"expected JiT-S/P with S one of B, L, H, G"):
        ModelConfig.named(name)


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (ModelConfig, {"image_size": 30, "patch_size": 4}, "patch_size 4 does not divide.* 30"),
        (ModelConfig, {"hidden_size": 770}, "hidden_size 770 is not a multiple of 4"),
        (ModelConfig, {"depth": 4}, "in_context_start 4 is not below depth 4"),
        (ModelConfig, {"width": 4}, "Extra inputs are not permitted"),
        (SamplerConfig, {"steps": 0}, "greater than or equal to 1"),
        (SamplerConfig, {"cfg_scale": float("nan")}, "finite number"),
        (SamplerConfig, {"cfg_interval": (0.5, 0.2)}, "not 0 <= low < high <= 1"),
        (OptimizerConfig, {"ema_decays": (0.5, 0.9, 0.9)}, "0.9 is there more than once: name"),
        (FlowConfig, {"t_eps": 0.0}, "greater than 0"),
        (FlowConfig, {"loss": "eps"}, "Input should be 'x', 'e' or 'v'"),
    ],
)
def test_contradictions_are_refused_at_construction(config, fields, message):
    with pytest.raises(ValidationError, match=message):
        config(**fields)

"""The network against the authors', with equal weights that make every part matter."""

from __future__ import annotations

import pytest
import torch

from jitmodel.config import ModelConfig
from jitmodel.model import JiT


@pytest.fixture(scope="module")
def authors():
    """The authors' network as the azula package carries it, run without compilation."""
    module = pytest.importorskip("azula.plugins.jit._src.model", reason="needs the dev extra azula")
    torch.compiler.set_stance("force_eager")
    yield module.JiT_models
    torch.compiler.set_stance("default")


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Random weights everywhere; adaLN biases near 0.7, so that gates are open in every block."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "adaLN" in name and name.endswith("bias"):
            parameter.copy_(0.7 + 0.3 * noise)
        elif "norm" in name:
            parameter.copy_(1 + 0.2 * noise)
        elif name.endswith("bias") or "adaLN" in name or name.startswith("final_layer"):
            parameter.copy_(0.02 * noise)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize(("name", "image_size"), [("B/16", 256), ("B/32", 512)])
def test_outputs_and_gradients_equal_the_authors(authors, name, image_size):
    theirs = authors[f"JiT-{name}"](input_size=image_size)
    randomise(theirs)
    ours = JiT(ModelConfig.named(f"JiT-{name}", image_size=image_size))
    ours.load_state_dict({f"net.{k}": v for k, v in theirs.state_dict().items()})
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(2, 3, image_size, image_size, generator=generator)
    t, y = torch.tensor([0.3, 0.9]), torch.tensor([207, 1000])  # 1000 is the null label

    x_ours, x_theirs = ours(z, t, y), theirs(z, t, y)

    assert x_theirs.std() > 0.1
    for image in range(2):
        assert relative(x_ours[image], x_theirs[image]) < 1e-5
    direction = torch.randn(x_ours.shape, generator=generator)
    (x_ours * direction).sum().backward()
    (x_theirs * direction).sum().backward()
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    expected.pop("pos_embed", None)
    assert {n for n, _ in ours.named_parameters()} == set(expected)
    for parameter_name, parameter in ours.named_parameters():
        assert expected[parameter_name].norm() > 0, parameter_name
        assert relative(parameter.grad, expected[parameter_name]) < 1e-4, parameter_name
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize(("sharpness", "bound"), [(1.0, 0.03), (3.0, 0.1)])
def test_bf16_is_as_close_to_fp32_as_the_authors_bf16(authors, sharpness, bound):
    """We round q and k to bf16 before their product, the authors after the softmax.

    Trained q and k norms grow, and with them the logits that the rounding disturbs.
    """
    config = ModelConfig.named("JiT-B/16", image_size=256)
    theirs = authors["JiT-B/16"](input_size=256)
    randomise(theirs)
    with torch.no_grad():
        for block in theirs.blocks:
            block.attn.q_norm.weight.mul_(sharpness)
            block.attn.k_norm.weight.mul_(sharpness)
    ours = JiT(config)
    ours.load_state_dict(theirs.state_dict())
    z = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    t, y = torch.tensor([0.3, 0.9]), torch.tensor([207, 1000])

    with torch.no_grad():
        exact = ours(z, t, y)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            error_ours = relative(ours(z, t, y).float(), exact)
            error_theirs = relative(theirs(z, t, y).float(), exact)

    assert 0 < error_ours < bound
    assert error_ours < 1.25 * error_theirs

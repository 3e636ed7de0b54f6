"""Our DINOv2 against torch's own Transformer layers, and its extractor, on random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.dinov2 import Block, Dinov2, load_dinov2
from pipelines.features import get_extractor


def random_state(network: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(value.shape, generator=generator) * value.shape[-1] ** -0.5
        + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        for name, value in network.state_dict().items()
    }


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2-S/14 of two blocks, in the public layout."""
    path = tmp_path_factory.mktemp("dinov2") / "dinov2_vits14_pretrain.pth"
    torch.save(random_state(Dinov2(384, 2, 37, gated=False)), path)
    return path


def torch_layer(block: Block, width: int) -> nn.TransformerEncoderLayer:
    """torch's pre-norm layer with the weights of a block, its scales multiplied into them."""
    s, (g1, g2) = block.state_dict(), (block.ls1["gamma"], block.ls2["gamma"])
    layer = nn.TransformerEncoderLayer(
        width, width // 64, 4 * width, dropout=0.0, activation="gelu", layer_norm_eps=1e-6,
        batch_first=True, norm_first=True,
    )  # fmt: skip
    layer.load_state_dict(
        {
            "self_attn.in_proj_weight": s["attn.qkv.weight"],
            "self_attn.in_proj_bias": s["attn.qkv.bias"],
            "self_attn.out_proj.weight": g1[:, None] * s["attn.proj.weight"],
            "self_attn.out_proj.bias": g1 * s["attn.proj.bias"],
            "linear1.weight": s["mlp.fc1.weight"],
            "linear1.bias": s["mlp.fc1.bias"],
            "linear2.weight": g2[:, None] * s["mlp.fc2.weight"],
            "linear2.bias": g2 * s["mlp.fc2.bias"],
            **{name: s[name] for name in s if name.startswith("norm")},
        }
    )
    return layer.eval()


def test_a_block_is_a_pre_norm_transformer_layer_with_scaled_branches():
    block = Block(128, gated=False)
    block.load_state_dict(random_state(block))
    x = torch.randn(2, 5, 128)

    torch.testing.assert_close(block(x), torch_layer(block, 128)(x), rtol=1e-4, atol=1e-5)


def test_the_largest_size_gates_its_feed_forward():
    block = Block(192, gated=True)
    block.load_state_dict(random_state(block))
    s = block.state_dict()
    assert s["mlp.w12.weight"].shape == (1024, 192)  # 2/3 of 768, rounded up to 512, twice
    with torch.no_grad():
        block.ls1["gamma"].zero_()  # leaves the feed-forward alone
    x = torch.randn(2, 5, 192)

    h = F.linear(F.layer_norm(x, (192,), s["norm2.weight"], s["norm2.bias"], 1e-6),
                 s["mlp.w12.weight"], s["mlp.w12.bias"])  # fmt: skip
    h = F.linear(F.silu(h[..., :512]) * h[..., 512:], s["mlp.w3.weight"], s["mlp.w3.bias"])

    torch.testing.assert_close(block(x), x + s["ls2.gamma"] * h, rtol=1e-4, atol=1e-5)


def test_the_network_is_patches_places_blocks_and_the_first_token(weights_file: Path):
    state = torch.load(weights_file, weights_only=True)
    network = load_dinov2(state).eval()
    x = torch.randn(2, 3, 518, 518)[:, :, :224, :224]

    with torch.no_grad():
        found = network(x)

        patches = x.unfold(2, 14, 14).unfold(3, 14, 14)  # [2, 3, 16, 16, 14, 14]
        tokens = torch.einsum("bcijpq,dcpq->bijd", patches, state["patch_embed.proj.weight"])
        tokens = (tokens + state["patch_embed.proj.bias"]).flatten(1, 2)
        tokens = torch.cat((state["cls_token"].expand(2, 1, 384), tokens), 1)
        tokens = tokens + network.places(16, 16)
        for block in network.blocks:
            tokens = torch_layer(block, 384)(tokens)
        first = F.layer_norm(tokens, (384,), state["norm.weight"], state["norm.bias"], 1e-6)[:, 0]
    torch.testing.assert_close(found, first, rtol=1e-3, atol=1e-4)


def test_places_keep_the_class_token_and_follow_the_corners_of_the_grid():
    network = Dinov2(384, 1, 37, gated=False)
    rows = torch.arange(37.0)[:, None, None].expand(37, 37, 384)
    with torch.no_grad():
        network.pos_embed.copy_(torch.cat((torch.full((1, 384), 7.0), rows.flatten(0, 1)))[None])

        found = network.places(16, 16)

    assert (found[0, 0] == 7).all()
    grid = found[0, 1:, 0].reshape(16, 16)
    torch.testing.assert_close(grid[:, 0], grid[:, 15])
    # Row i of 16 lies at (i + 1/2) 37 / 16.1 - 1/2 of 37, away from the border of the filter.
    expected = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    torch.testing.assert_close(grid[2:14, 0], expected[2:14], rtol=0, atol=0.2)
    assert torch.equal(network.places(37, 37), network.pos_embed)


def test_dinov2_is_an_extractor_whose_file_is_in_its_name(weights_file: Path):
    extractor = get_extractor("dinov2", str(weights_file))
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)

    found = extractor(pixels)

    identity = extractor.identity
    assert identity.name == f"dinov2-vits14-{identity.sha256[:8]}"
    assert identity.distance == f"FD-{identity.name}"
    assert (identity.input_size, identity.num_features, identity.num_logits) == (224, 384, 0)
    assert found.pooled.shape == (3, 384)
    assert found.logits.shape == found.spatial.shape == (3, 0)
    assert found.pooled.std() > 0.1
    alone = extractor(pixels[1:2]).pooled
    torch.testing.assert_close(alone[0], found.pooled[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_type_are_computed_in_fp32(
    weights_file: Path, tmp_path: Path, dtype: torch.dtype
):
    state = torch.load(weights_file, weights_only=True)
    torch.save({name: value.to(dtype) for name, value in state.items()}, tmp_path / "other.pth")
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)

    found = get_extractor("dinov2", str(tmp_path / "other.pth"))(pixels).pooled

    expected = get_extractor("dinov2", str(weights_file))(pixels).pooled
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_a_file_that_is_no_dinov2_is_refused(weights_file: Path, tmp_path: Path):
    state = torch.load(weights_file, weights_only=True)
    del state["blocks.1.norm1.bias"]
    torch.save(state, tmp_path / "lacking.pth")
    torch.save({"cls_token": torch.zeros(1, 1, 100)}, tmp_path / "narrow.pth")
    torch.save({"cls_token": torch.tensor(1.0)}, tmp_path / "scalar.pth")
    torch.save({**state, "pos_embed": torch.zeros(5)}, tmp_path / "flat.pth")
    for name in ("scalar", "flat"):
        with pytest.raises(ValueError, match=rf"{name}.pth does not hold this network's weights"):
            get_extractor("dinov2", str(tmp_path / f"{name}.pth"))

    with pytest.raises(FileNotFoundError, match=r"dinov2 needs its weights as a file: get dinov2_"):
        get_extractor("dinov2")
    with pytest.raises(ValueError, match=r"lacking.pth does not hold .*blocks.1.norm1.bias"):
        get_extractor("dinov2", str(tmp_path / "lacking.pth"))
    with pytest.raises(ValueError, match=r"narrow.pth does not hold .*cls_token has width 100"):
        get_extractor("dinov2", str(tmp_path / "narrow.pth"))

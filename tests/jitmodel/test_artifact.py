"""An artifact is what it says, or it is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from jitmodel.artifact import ArtifactInfo, load_artifact, read_info, save_artifact
from jitmodel.config import ClassInfo, FlowConfig, ModelConfig
from jitmodel.model import JiT
from jitmodel.pixels import to_pixels, to_x

SMALL = ModelConfig(
    image_size=16, patch_size=4, hidden_size=32, depth=4, num_heads=2, bottleneck_dim=8,
    in_context_len=4, in_context_start=1, num_classes=3,
)  # fmt: skip
CLASSES = (
    ClassInfo(name="tench, Tinca tinca", wnid="n01440764"),
    ClassInfo(name="goldfish"),
    ClassInfo(name="2"),
)


@pytest.fixture
def folder(tmp_path):
    model = JiT(SMALL, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.final_layer.linear.weight.fill_(0.1)
    flow = FlowConfig(noise_scale=2.0)
    save_artifact(
        tmp_path / "a", model.state_dict(), ArtifactInfo(model=SMALL, flow=flow, classes=CLASSES)
    )
    return tmp_path / "a"


def test_a_loaded_model_draws_what_the_saved_one_drew(folder):
    original = JiT(SMALL, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        original.final_layer.linear.weight.fill_(0.1)
    z = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    t, y = torch.tensor([0.2, 0.8]), torch.tensor([0, 3])

    loaded = load_artifact(folder)

    assert torch.equal(loaded(z, t, y), original(z, t, y))
    assert loaded.flow.noise_scale == 2.0
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert read_info(folder).classes == CLASSES


def test_equal_weights_give_equal_bytes(folder, tmp_path):
    info = read_info(folder)
    again = save_artifact(tmp_path / "b", load_file(folder / "model.safetensors"), info)

    assert again == info
    assert (tmp_path / "b/config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_a_weight_of_another_shape_is_named_with_both_shapes(folder):
    config = json.loads((folder / "config.json").read_text())
    config["model"]["num_classes"], config["classes"] = 7, []
    (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(
        ValueError, match=r"embedding_table.weight has shape \(4, 32\).*asks for \(8, 32\)"
    ):
        load_artifact(folder)


def test_missing_and_unknown_weights_are_named(folder):
    weights = load_file(folder / "model.safetensors")
    weights["blocks.9.extra"] = weights.pop("blocks.1.norm1.weight")
    info = read_info(folder).model_copy(update={"weights_sha256": ""})

    with pytest.raises(ValueError, match=r"blocks.1.norm1.weight of shape .* is missing"):
        save_artifact(folder, weights, info)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(info.model_dump_json())
    with pytest.raises(ValueError, match=r"blocks.1.norm1.weight of shape .* is missing"):
        load_artifact(folder)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("damage", ["truncated", "header", "empty"])
def test_a_damaged_file_is_refused(folder, damage, verify):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    damaged = {
        "truncated": data[: len(data) // 2],
        "header": (2**60).to_bytes(8, "little") + data[8:],
        "empty": b"",
    }
    path.write_bytes(damaged[damage])

    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_artifact(folder, verify=verify)


def test_one_flipped_bit_is_noticed(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)

    with pytest.raises(ValueError, match=r"sha256 .* but config.json says"):
        load_artifact(folder)


def test_a_folder_that_is_no_artifact_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no artifact at .*jit export"):
        load_artifact(tmp_path)


def test_the_values_0_to_255_survive_the_way_to_x_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)

    assert torch.equal(to_pixels(to_x(pixels)), pixels)
    assert to_pixels(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]
    assert to_x(pixels).aminmax() == (-1.0, 1.0)


def test_names_of_some_classes_are_refused(folder):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"classes": config["classes"][:2]}))

    with pytest.raises(ValueError, match="3 classes, but 2 are named: name all of them, or none"):
        read_info(folder)

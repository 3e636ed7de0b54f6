"""The health check: synthetic failures on real images."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.health import Health, findings, measure


@pytest.fixture(scope="module")
def clothes(repository) -> np.ndarray:
    """400 real images, uint8 [N, 3, 28, 28]."""
    table = pq.read_table(repository / "pipelines/embedded/fashion-mnist.parquet").slice(0, 400)
    pictures = [
        np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"))
        for row in table.to_pylist()
    ]
    return np.stack(pictures).transpose(0, 3, 1, 2)


@pytest.fixture(scope="module")
def photographs(imagenet_sample) -> np.ndarray:
    """40 real photographs, uint8 [N, 3, 256, 256]."""
    files = sorted(imagenet_sample.glob("*.JPEG"))[:40]
    pictures = [np.asarray(Image.open(f).convert("RGB").resize((256, 256))) for f in files]
    return np.stack(pictures).transpose(0, 3, 1, 2)


def with_seams(pixels: np.ndarray, patch: int, strength: float, seed: int = 0) -> np.ndarray:
    """Each patch is a little brighter or darker than the image was: what a network leaves."""
    n, _, h, w = pixels.shape
    offsets = np.random.default_rng(seed).normal(0, strength, (n, 1, h // patch, w // patch))
    tiled = offsets.repeat(patch, axis=2).repeat(patch, axis=3)
    return (pixels + tiled).clip(0, 255).astype(np.uint8)


def test_real_images_have_no_failure(clothes, photographs):
    for pixels, patches in ((clothes, (4, 7, 14)), (photographs, (8, 16, 32))):
        for patch in patches:
            half = len(pixels) // 2
            real, others = measure(pixels[:half], patch), measure(pixels[half:], patch)
            assert findings(others, real) == []


@pytest.mark.parametrize("patch", [8, 16, 32])
def test_seams_of_photographs_are_named_at_their_period_only(photographs, patch):
    half = len(photographs) // 2
    drawn = with_seams(photographs[half:], patch, strength=6)

    (sentence,) = findings(measure(drawn, patch), measure(photographs[:half], patch))

    assert "seams at the patch borders" in sentence
    other = 20  # no multiple of the period
    assert findings(measure(drawn, other), measure(photographs[:half], other)) == []


def test_seams_of_small_images_are_named(clothes):
    drawn = with_seams(clothes[200:280], 4, strength=25)

    (sentence,) = findings(measure(drawn, 4), measure(clothes[:200], 4))

    assert "seams" in sentence


def test_the_seam_score_rises_with_the_seams(photographs):
    scores = [measure(with_seams(photographs, 16, s), 16).seams for s in (0, 2, 4, 8, 16)]

    assert scores == sorted(scores)
    assert scores[0] < 0.15
    assert scores[-1] > 0.9


def test_grey_images_are_named(clothes):
    mean = clothes.mean(axis=0, keepdims=True)
    drawn = (mean * 0.1 + 100 + 0 * clothes[:80]).astype(np.uint8)

    (sentence,) = findings(measure(drawn, 4), measure(clothes, 4))

    assert "grey (contrast 0." in sentence


def test_images_of_one_glaring_colour_are_saturated_as_well_as_grey(clothes):
    white = np.full_like(clothes[:80], 255)

    saturated, grey = findings(measure(white, 4), measure(clothes, 4))

    assert "saturated (100%" in saturated
    assert "grey" in grey


def test_saturated_images_are_named_but_not_a_white_background(photographs, clothes):
    harsh = ((photographs.astype(float) - 128) * 4 + 128).clip(0, 255).astype(np.uint8)

    (sentence,) = findings(measure(harsh, 16), measure(photographs, 16))

    assert "saturated" in sentence
    assert measure(clothes, 4).clipped > 0.4  # half of each image is background
    assert findings(measure(clothes, 4), measure(clothes, 4)) == []


def test_an_image_of_two_patches_has_no_score():
    flat = np.zeros((2, 3, 28, 28), np.uint8)

    assert measure(flat, 14) == Health(contrast=0.0, clipped=1.0, seams=0.0)

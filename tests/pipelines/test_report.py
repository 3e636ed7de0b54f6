"""Grids and the pages of an evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jitmodel.config import ClassInfo
from pipelines import dataset_card
from pipelines.report import drawable, image_grid, load_font


def test_a_grid_places_images_row_by_row_on_white():
    red, green, blue = np.eye(3, dtype=np.uint8)[:, :, None, None] * 255
    pixels = torch.from_numpy(
        np.stack([p + np.zeros((3, 8, 8), np.uint8) for p in (red, green, blue)])
    )

    grid = np.asarray(image_grid(pixels, columns=2))

    assert grid.shape == (2 + 2 * 10, 2 + 2 * 10, 3)
    assert grid[6, 6].tolist() == [255, 0, 0]
    assert grid[6, 16].tolist() == [0, 255, 0]
    assert grid[16, 6].tolist() == [0, 0, 255]
    assert grid[16, 16].tolist() == [255, 255, 255]  # the last row is not full
    assert grid[0].min() == 255  # the gutter


def test_a_grid_is_the_same_for_either_layout_and_enlarges_without_smoothing():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 5), dtype=np.uint8)

    first = np.asarray(image_grid(pixels, columns=4, scale=3))
    last = np.asarray(image_grid(pixels.transpose(0, 2, 3, 1), columns=4, scale=3))

    assert (first == last).all()
    assert first[2:17:3, 2:17:3].tolist() == pixels[0].transpose(1, 2, 0).tolist()


def test_labels_stand_left_of_their_rows_and_are_not_cut_off():
    pixels = np.zeros((4, 3, 28, 28), np.uint8)

    bare = image_grid(pixels, columns=2)
    labelled = image_grid(pixels, columns=2, row_labels=["bag", "a very long class name indeed"])

    left = labelled.width - bare.width
    strip = np.asarray(labelled)[:, :left]
    assert labelled.height == bare.height
    assert left > 100
    assert strip[:30].min() < 100  # ink beside the first row
    assert strip[30:].min() < 100  # and beside the second
    assert strip[:, 0].min() == 255  # the long label begins inside the picture


@pytest.mark.parametrize(
    ("label", "drawn"),
    [
        *[
            (name, name)
            for name in ("T-shirt/top", "Füße", "Äpfel", "crème brûlée", "кошка", "γάτα")
        ],
        ("日本語", r"\u65e5\u672c\u8a9e"),
        ("two\nlines", r"two\nlines"),  # Pillow would refuse them
        ("not UTF-8 \udcff", r"not UTF-8 \udcff"),
    ],
)
def test_a_label_of_any_language_is_drawn_or_escaped_but_no_box(label: str, drawn: str):
    assert drawable(label) == drawn
    font = load_font(20)
    box = bytes(font.getmask("\U00010fff"))  # what stands for a sign that the font does not have
    assert all(bytes(font.getmask(sign)) != box for sign in drawn)

    pixels = np.zeros((1, 3, 64, 64), np.uint8)
    grids = [np.asarray(image_grid(pixels, 1, row_labels=[text])) for text in (label, drawn)]
    assert (grids[0] == grids[1]).all()


def test_a_class_whose_name_has_no_signs_is_shown_by_its_wnid_or_number():
    assert dataset_card._title(3, ClassInfo(name="Füße, feet")) == "Füße"
    assert dataset_card._title(3, ClassInfo(name="日本語")) == "class 3"
    assert dataset_card._title(3, ClassInfo(name="日本語", wnid="n01440764")) == "n01440764"


def test_a_grid_refuses_what_are_not_pixels():
    with pytest.raises(ValueError, match=r"uint8 pixels .* not float32 \[2, 3, 4, 4\]"):
        image_grid(torch.zeros(2, 3, 4, 4), columns=2)
    with pytest.raises(ValueError, match="1 row labels for a grid of 2 rows"):
        image_grid(np.zeros((4, 3, 4, 4), np.uint8), columns=2, row_labels=["one"])

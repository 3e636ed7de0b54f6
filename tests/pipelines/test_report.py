"""Grids and the pages of an evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipelines.report import image_grid


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


def test_a_grid_refuses_what_are_not_pixels():
    with pytest.raises(ValueError, match=r"uint8 pixels .* not float32 \[2, 3, 4, 4\]"):
        image_grid(torch.zeros(2, 3, 4, 4), columns=2)
    with pytest.raises(ValueError, match="1 row labels for a grid of 2 rows"):
        image_grid(np.zeros((4, 3, 4, 4), np.uint8), columns=2, row_labels=["one"])

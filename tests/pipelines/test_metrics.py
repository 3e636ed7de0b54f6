"""Metrics by hand on small cases, and against torch-fidelity on features of real size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from pipelines import metrics
from pipelines.metrics import (
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    neighbourhoods,
)


def features(seed: int, num: int, width: int, shift: float = 0.0) -> np.ndarray:
    """Non-negative and correlated, like pooled activations."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(width, width)) / width**0.5
    return np.maximum(rng.normal(shift, 1, (num, width)) @ mix, 0).astype(np.float32)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    m, n = Moments.of(a), Moments.of(b)
    return frechet_distance(m.mean, m.covariance, n.mean, n.covariance)


def fidelity_distance(a: np.ndarray, b: np.ndarray) -> float:
    stats = [fid_features_to_statistics(torch.from_numpy(f).double()) for f in (a, b)]
    return fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 9), min_size=2, max_size=6))
@settings(max_examples=30, deadline=None)
def test_moments_add_up_in_any_order(seed: int, sizes: list[int]):
    rng = np.random.default_rng(seed)
    parts = [rng.normal(size=(n, 3)).astype(np.float32) for n in sizes]
    moments = [Moments.of(p) for p in parts]

    forward = sum(moments[1:], start=moments[0])
    backward = sum(moments[-2::-1], start=moments[-1])

    whole = np.concatenate(parts).astype(np.float64)
    for total in (forward, backward):
        assert total.count == len(whole)
        np.testing.assert_allclose(total.mean, whole.mean(0), atol=1e-12)
        np.testing.assert_allclose(total.covariance, np.cov(whole, rowvar=False), atol=1e-12)


@given(st.floats(-5, 5), st.floats(0.1, 4), st.floats(0.1, 4))
def test_the_frechet_distance_of_two_normals_on_a_line_is_textbook(m: float, s: float, r: float):
    def one(value: float) -> np.ndarray:
        return np.array([[value]])

    found = frechet_distance(np.array([m]), one(s**2), np.array([0.0]), one(r**2))

    assert found == pytest.approx(m**2 + (s - r) ** 2, abs=1e-9)


def test_a_distribution_is_at_no_distance_from_itself():
    f = features(0, 500, 32)
    assert distance(f, f) == pytest.approx(0, abs=1e-9)
    assert kernel_distance(f, f, subsets=5)[0] <= 0  # unbiased: the diagonal is left out
    assert neighbourhoods(f, f, (3,))[3]["precision"] == 1


@pytest.mark.parametrize(
    ("num", "dead"),
    [(600, 0), (100, 0), (600, 5)],
    ids=["full rank", "few images", "dead features"],
)
def test_the_frechet_distance_agrees_with_torch_fidelity_even_when_singular(num: int, dead: int):
    a, b = features(1, num, 128), features(2, num, 128, shift=0.3)
    a[:, :dead] = 0
    assert distance(a, b) == pytest.approx(fidelity_distance(a, b), rel=1e-4)
    assert distance(b, a) == pytest.approx(distance(a, b), rel=1e-6)


def test_scores_and_kernel_distances_agree_with_torch_fidelity():
    a, b = features(1, 1500, 64), features(2, 1200, 64, shift=0.2)
    logits = np.random.default_rng(0).normal(0, 3, (1003, 20)).astype(np.float32)

    score = isc_features_to_metric(torch.from_numpy(logits))
    kid = kid_features_to_metric(
        torch.from_numpy(a), torch.from_numpy(b), kid_subsets=10, verbose=False
    )

    assert inception_score(logits) == pytest.approx(tuple(score.values()), rel=1e-6)
    assert kernel_distance(a, b, subsets=10) == pytest.approx(tuple(kid.values()), rel=1e-4)


def test_precision_and_recall_agree_with_torch_fidelity_whatever_the_block(monkeypatch):
    a, b = features(1, 700, 48), features(2, 600, 48, shift=0.4)
    expected = prc_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), verbose=False)

    monkeypatch.setattr(metrics, "BLOCK", 97)
    found = neighbourhoods(a, b, (3, 5))

    assert found[3]["precision"] == pytest.approx(expected["precision"], abs=1e-3)
    assert found[3]["recall"] == pytest.approx(expected["recall"], abs=1e-3)
    assert 0 < found[3]["precision"] < found[5]["precision"] <= 1


def test_neighbourhoods_on_a_line_can_be_counted_by_hand():
    real = np.array([[0.0], [1.0], [2.0], [10.0]])  # with k=1 the balls have radius 1, 1, 1, 8
    generated = np.array([[0.5], [3.0], [30.0]])  # and here 2.5, 2.5, 27

    found = neighbourhoods(generated, real, (1,))[1]

    assert found == {
        "precision": 2 / 3,  # 30 is in no real ball
        "recall": 1.0,  # 0, 1 and 2 lie within 2.5 of 0.5; 10 within 27 of 30
        "density": (2 + 2 + 0) / 3,  # 0.5: balls of 0 and 1; 3: balls of 2 and 10
        "coverage": 1.0,
    }


def test_the_inception_score_is_one_for_one_guess_and_the_number_of_classes_for_sure_guesses():
    same = np.zeros((40, 4))
    sure = 1000 * np.eye(4)[np.arange(40) % 4]  # probabilities that underflow to exactly 0

    assert inception_score(same) == pytest.approx((1, 0))
    assert inception_score(sure, splits=1)[0] == pytest.approx(4)


def test_too_few_images_are_refused_with_their_number():
    one = np.zeros((1, 2))
    with pytest.raises(ValueError, match="at least 2 images, not 1"):
        _ = Moments.of(one).covariance
    with pytest.raises(ValueError, match="at least 2 images on both sides, not 1"):
        kernel_distance(one, one)
    with pytest.raises(ValueError, match="3 neighbours need more images than 1 generated"):
        neighbourhoods(one, one, (3,))

"""Metrics by hand on small cases, and against torch-fidelity on features of real size."""

from __future__ import annotations

import tracemalloc

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
    Real,
    Statistics,
    all_metrics,
    frechet_distance,
    frechet_interval,
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
@settings(max_examples=30)
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


def test_the_interval_is_as_wide_as_the_distance_scatters_when_images_are_drawn_anew():
    real = Moments.of(features(0, 4000, 12))

    found, widths = [], []
    for seed in range(1, 61):
        drawn = features(seed, 800, 12, shift=0.3)
        moments = Moments.of(drawn)
        d = frechet_distance(moments.mean, moments.covariance, real.mean, real.covariance)
        low, high = frechet_interval(drawn, moments, real.mean, real.covariance)
        found.append(d)
        widths.append(high - low)
        assert low < 0 < high

    # 95 % of a normal distribution lie within 1.96 standard deviations; 60 draws know one to 9 %.
    assert np.mean(widths) / (2 * 1.96) == pytest.approx(np.std(found), rel=0.3)


def test_the_interval_is_the_one_of_resampling_with_a_matrix_root_each_time():
    real, drawn = Moments.of(features(0, 3000, 8)), features(1, 1500, 8, shift=0.4)
    rng, moments = np.random.default_rng(0), Moments.of(drawn)

    low, high = frechet_interval(drawn, moments, real.mean, real.covariance)

    resampled = []
    for _ in range(400):
        m = Moments.of(drawn[rng.integers(0, len(drawn), len(drawn))])
        resampled.append(frechet_distance(m.mean, m.covariance, real.mean, real.covariance))
    expected = np.quantile(resampled, 0.975) - np.quantile(resampled, 0.025)
    assert high - low == pytest.approx(expected, rel=0.2)
    # What it does not have is the bias of a resample, which holds fewer different images.
    here = frechet_distance(moments.mean, moments.covariance, real.mean, real.covariance)
    assert np.mean(resampled) > here


@pytest.mark.parametrize("num", [2, 20])
def test_the_interval_exists_when_the_covariance_is_singular(num: int):
    real, drawn = Moments.of(features(0, 200, 32)), features(1, num, 32)

    low, high = frechet_interval(drawn, Moments.of(drawn), real.mean, real.covariance)

    assert np.isfinite([low, high]).all()
    assert low <= 0 <= high


def test_few_images_bias_the_frechet_distance_upwards():
    real = features(0, 20_000, 32)

    found = [distance(features(1, num, 32), real) for num in (20, 33, 100, 1000, 10_000)]

    assert found == sorted(found, reverse=True)
    assert found[0] > 10 * found[-1]


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.floats(0.1, 10), st.integers(2, 40))
@settings(max_examples=40)
def test_a_frechet_distance_is_symmetric_shifts_add_and_scales_square(
    seed: int, width: int, scale: float, num: int
):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(num, width)), rng.normal(size=(num + 3, width))
    shift = rng.normal(size=width)

    d = distance(a, b)

    assert distance(b, a) == pytest.approx(d, abs=1e-6)
    assert distance(scale * a, scale * b) == pytest.approx(scale**2 * d, rel=1e-6, abs=1e-6)
    assert distance(a + shift, b + shift) == pytest.approx(d, abs=1e-6)
    assert distance(a, a + shift) == pytest.approx(shift @ shift, rel=1e-6, abs=1e-6)
    assert d > -1e-6


@given(st.lists(st.floats(0.01, 50), min_size=1, max_size=5), st.data())
@settings(max_examples=40)
def test_the_frechet_distance_of_independent_features_is_a_sum_over_them(
    variances: list[float], data: st.DataObject
):
    others = data.draw(st.lists(st.floats(0, 50), min_size=len(variances), max_size=len(variances)))
    zero = np.zeros(len(variances))

    found = frechet_distance(zero, np.diag(variances), zero, np.diag(others))

    by_hand = sum((a**0.5 - b**0.5) ** 2 for a, b in zip(variances, others, strict=True))
    assert found == pytest.approx(by_hand, abs=1e-6)


@given(st.lists(st.lists(st.floats(-3, 3), min_size=2, max_size=2), min_size=2, max_size=6))
@settings(max_examples=40)
def test_the_kernel_distance_is_its_sum_over_pairs(rows: list[list[float]]):
    x, y = np.array(rows), np.array(rows)[::-1] + 0.5

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (a @ b / 2 + 1) ** 3

    n, pairs = len(x), [(i, j) for i in range(len(x)) for j in range(len(x))]
    within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j) / (n * (n - 1))
    across = sum(k(x[i], y[j]) for i, j in pairs) / n**2

    # With subsets as large as the sets, every subset is the whole.
    mean, std = kernel_distance(x, y, subsets=3)
    assert mean == pytest.approx(within - 2 * across, rel=1e-9, abs=1e-9)
    assert std == pytest.approx(0, abs=1e-9)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(4, 12),
    st.integers(4, 12),
    st.integers(1, 3),
    st.sampled_from((3, 8, 50)),
)
@settings(max_examples=100)
def test_neighbourhoods_are_what_counting_every_pair_gives(
    seed: int, n: int, m: int, k: int, high: int
):
    rng = np.random.default_rng(seed)
    drawn, real = (
        rng.integers(0, high, (n, 3)).astype(float),
        rng.integers(0, high, (m, 3)).astype(float),
    )

    def radius(points: np.ndarray, i: int) -> float:
        return sorted(np.sum((points[i] - p) ** 2) for j, p in enumerate(points) if j != i)[k - 1]

    inside_real = [
        [np.sum((g - r) ** 2) <= radius(real, j) for j, r in enumerate(real)] for g in drawn
    ]
    inside_drawn = [
        [np.sum((g - r) ** 2) <= radius(drawn, i) for i, g in enumerate(drawn)] for r in real
    ]

    found = neighbourhoods(drawn, real, (k,))[k]
    assert found["precision"] == pytest.approx(np.mean([any(row) for row in inside_real]))
    assert found["recall"] == pytest.approx(np.mean([any(row) for row in inside_drawn]))
    assert found["density"] == pytest.approx(np.sum(inside_real) / (k * n))
    assert found["coverage"] == pytest.approx(np.mean(np.any(inside_real, axis=0)))


def test_an_image_on_the_edge_of_a_ball_is_inside_though_the_mean_is_no_float32():
    drawn, real = np.array([[1.0]] * 4), np.array([[2.0], [4.0], [3.0], [0.0], [0.0]])

    found = neighbourhoods(drawn, real, (1,))[1]

    assert found["precision"] == 1  # 1 is at distance 1 of 2, whose nearest other is 3
    assert found["density"] == 1  # and in the ball of 2 alone
    assert found["recall"] == 0


@pytest.mark.parametrize("width", [2, 8])
def test_ties_are_counted_as_in_torch_fidelity_whatever_the_block(
    width: int, monkeypatch: pytest.MonkeyPatch
):
    rng = np.random.default_rng(width)
    a, b = (rng.integers(0, 20, (n, width)).astype(np.float32) for n in (700, 600))
    expected = prc_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), verbose=False)

    monkeypatch.setattr(metrics, "BLOCK", 97)
    found = neighbourhoods(a, b, (3,))[3]

    assert found["precision"] == pytest.approx(expected["precision"], abs=1e-6)
    assert found["recall"] == pytest.approx(expected["recall"], abs=1e-6)


def test_images_that_come_six_times_are_found_in_a_copy_of_their_set():
    once = np.random.default_rng(0).gamma(1, size=(60, 2048)).astype(np.float32)
    real = np.repeat(once, 6, axis=0)  # every ball has radius 0

    found = neighbourhoods(np.tile(once, (6, 1)), real, (3, 5))

    for k in (3, 5):
        assert found[k] == {"precision": 1, "recall": 1, "density": 6 / k, "coverage": 1}


def test_distances_are_never_in_memory_as_a_whole():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(6000, 16)).astype(np.float32) for _ in range(2))

    tracemalloc.start()
    neighbourhoods(a, b, (3, 5))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    block = metrics.BLOCK**2 * 4
    assert peak < 4 * block, peak / block  # the whole would be 8.6 blocks


def test_what_an_extractor_or_a_reference_lacks_is_absent_and_the_rest_is_there():
    drawn, real = features(0, 60, 8), features(1, 50, 8)
    logits, spatial = drawn[:, :4], drawn[:, 4:]
    m, none = Moments.of(real), np.empty((60, 0), np.float32)
    pooled = Statistics(m.mean, m.covariance)
    n = Moments.of(real[:, 4:])

    bare = all_metrics(drawn, none, none, Real(pooled))
    full = all_metrics(drawn, logits, spatial, Real(pooled, Statistics(n.mean, n.covariance), real))

    assert set(bare) == {"FD", "FD_low", "FD_high"}
    assert bare["FD_low"] < bare["FD"] < bare["FD_high"]
    assert full["sFD"] == pytest.approx(distance(spatial, real[:, 4:]))
    kin = {
        f"{name}_k{k}" for name in ("precision", "recall", "density", "coverage") for k in (3, 5)
    }
    assert set(full) == {*bare, "sFD", "IS", "IS_std", "KID", "KID_std", *kin}
    for kept, more in ((0, set()), (1, set()), (2, {"KID", "KID_std"}), (5, {"KID", "KID_std"})):
        few = all_metrics(drawn, none, none, Real(pooled, features=real[:kept]))
        assert set(few) == {*bare, *more}, kept


def test_scores_and_kernel_distances_agree_with_torch_fidelity():
    a, b = features(1, 1500, 64), features(2, 1200, 64, shift=0.2)
    logits = np.random.default_rng(0).normal(0, 3, (1003, 20)).astype(np.float32)

    score = isc_features_to_metric(torch.from_numpy(logits))
    kid = kid_features_to_metric(
        torch.from_numpy(a), torch.from_numpy(b), kid_subsets=10, verbose=False
    )

    assert inception_score(logits) == pytest.approx(tuple(score.values()), rel=1e-6)
    assert kernel_distance(a, b, subsets=10) == pytest.approx(tuple(kid.values()), rel=1e-4)


@pytest.mark.parametrize("outliers", ["anywhere", "first", "last"])
def test_precision_and_recall_agree_with_torch_fidelity_whatever_the_block(
    outliers: str, monkeypatch: pytest.MonkeyPatch
):
    a, b = features(1, 700, 48), features(2, 600, 48, shift=0.4)
    if outliers != "anywhere":  # rows learn of ever nearer neighbours, or of none after the first
        sign = -1 if outliers == "first" else 1
        a, b = (x[np.argsort(sign * np.linalg.norm(x - x.mean(0), axis=1))] for x in (a, b))
    expected = prc_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), verbose=False)

    monkeypatch.setattr(metrics, "BLOCK", 97)
    found = neighbourhoods(a, b, (3, 5))

    assert found[3]["precision"] == pytest.approx(expected["precision"], abs=1e-3)
    assert found[3]["recall"] == pytest.approx(expected["recall"], abs=1e-3)
    assert 0 < found[3]["precision"] < found[5]["precision"] <= 1


@pytest.mark.parametrize(("num", "real_num"), [(1500, 500), (500, 1500), (600, 600)])
def test_all_images_of_both_sides_count_as_in_torch_fidelity(num: int, real_num: int):
    drawn, real = features(1, num, 48), features(2, real_num, 48, shift=0.4)
    none, moments = np.empty((num, 0), np.float32), Moments.of(real)
    expected = prc_features_to_metric(torch.from_numpy(drawn), torch.from_numpy(real))

    statistics = Statistics(moments.mean, moments.covariance)
    found = all_metrics(drawn, none, none, Real(statistics, features=real))

    assert found["precision_k3"] == pytest.approx(expected["precision"], abs=1e-3)
    assert found["recall_k3"] == pytest.approx(expected["recall"], abs=1e-3)


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

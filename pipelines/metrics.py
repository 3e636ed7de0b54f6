"""Metrics of generated images, from stored features: arrays in, numbers out.

Frechet distance, Inception Score, kernel distance, precision, recall, density and coverage. All of
them agree with torch-fidelity 0.4.0 on equal features, down to the same splits and subsets, but
need neither a GPU nor all distances at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

SEED = 2020
"""torch-fidelity's seed; its order for the splits of IS and its subsets for KID follow from it."""

BLOCK = 1024
"""Rows of a distance matrix that exist at one time."""


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of outer products of features, in float64; they add up in any order."""

    count: int
    sum: Array
    outer: Array

    @classmethod
    def of(cls, features: Array) -> Moments:
        """Moments of features [N, D]."""
        f = features.astype(np.float64)
        return cls(len(f), f.sum(0), f.T @ f)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.sum + other.sum, self.outer + other.outer)

    @property
    def mean(self) -> Array:
        """Mean, [D]."""
        return self.sum / self.count

    @property
    def covariance(self) -> Array:
        """Unbiased covariance, [D, D].

        Raises:
            ValueError: there are fewer than two features.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, not {self.count}")
        centred = self.outer - np.outer(self.sum, self.mean)
        return centred / (self.count - 1)


def frechet_distance(mean_1: Array, cov_1: Array, mean_2: Array, cov_2: Array) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))  (Heusel et al., arXiv 1706.08500).

    The eigenvalues of S1 S2 are those of the symmetric L^T S2 L, where S1 = L L^T. L is a
    Cholesky factor, or the symmetric square root where S1 is singular (fewer images than
    features, or a feature that is always zero).
    """
    try:
        root = np.linalg.cholesky(cov_1)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(cov_1)
        root = vectors * np.sqrt(values.clip(0))
    product = root.T @ cov_2 @ root
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)
    trace_of_root = np.sqrt(eigenvalues.clip(0)).sum()
    difference = mean_1 - mean_2
    return float(difference @ difference + np.trace(cov_1) + np.trace(cov_2) - 2 * trace_of_root)


def inception_score(logits: Array, splits: int = 10) -> tuple[float, float]:
    """exp E KL(p(y|x) || p(y)) (Salimans et al., arXiv 1606.03498).

    Args:
        logits: [N, K].
        splits: parts of the shuffled images, each with its own p(y).

    Returns:
        Mean and standard deviation over the splits.
    """
    N = len(logits)
    order = np.random.RandomState(SEED).permutation(N)
    scores = []
    for i in range(splits):
        part = logits[order[i * N // splits : (i + 1) * N // splits]].astype(np.float64)
        part -= part.max(1, keepdims=True)
        log_p = part - np.log(np.exp(part).sum(1, keepdims=True))
        p = np.exp(log_p)
        with np.errstate(divide="ignore"):
            kl = p * (log_p - np.log(p.mean(0)))
        scores.append(np.exp(np.where(p > 0, kl, 0).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(
    generated: Array, real: Array, subsets: int = 100, subset_size: int = 1000
) -> tuple[float, float]:
    """KID: unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al., 1801.01401).

    Args:
        generated, real: features [N, D] and [M, D].
        subsets: random pairs of subsets to average over.
        subset_size: images in a subset; fewer if there are fewer.

    Returns:
        Mean and standard deviation over the subsets; the mean may be slightly below zero.
    """
    rng = np.random.RandomState(SEED)
    size = min(subset_size, len(generated), len(real))
    if size < 2:
        raise ValueError(f"a kernel distance needs at least 2 images on both sides, not {size}")
    values = []
    for _ in range(subsets):
        x = generated[rng.choice(len(generated), size, replace=False)].astype(np.float64)
        y = real[rng.choice(len(real), size, replace=False)].astype(np.float64)
        xx, yy, xy = _cubic(x, x), _cubic(y, y), _cubic(x, y)
        within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size * (size - 1))
        values.append(within - 2 * xy.mean())
    return float(np.mean(values)), float(np.std(values))


def _cubic(x: Array, y: Array) -> Array:
    kernel = x @ y.T / x.shape[1] + 1
    return kernel * kernel * kernel


def all_metrics(
    features: Array, logits: Array, mean: Array, covariance: Array, real: Array
) -> dict[str, float]:
    """Every metric of generated images, by plain names.

    Args:
        features, logits: of the generated images, [N, D] and [N, K].
        mean, covariance: of all reference features.
        real: some of the reference's features, [M, D]; against them, at most M generated images
            are counted for precision and its kin, because those depend on the numbers.
    """
    moments = Moments.of(features)
    found = {
        "FD": frechet_distance(moments.mean, moments.covariance, mean, covariance),
    }
    found["IS"], found["IS_std"] = inception_score(logits)
    found["KID"], found["KID_std"] = kernel_distance(features, real)
    for k, values in neighbourhoods(features[: len(real)], real, (3, 5)).items():
        found |= {f"{name}_k{k}": value for name, value in values.items()}
    return found


def neighbourhoods(
    generated: Array, real: Array, ks: tuple[int, ...]
) -> dict[int, dict[str, float]]:
    """Precision and recall (arXiv 1904.06991), density and coverage (2002.09797), for each k.

    A ball around each image reaches to its k-th nearest neighbour of its own kind. Precision:
    generated images inside some real ball. Recall: real images inside some generated ball.
    Density: real balls around a generated image, over k. Coverage: real balls that hold a
    generated image.

    Args:
        generated, real: features [N, D] and [M, D]; only BLOCK rows of distances exist at a time.
        ks: sizes of the neighbourhood.

    Raises:
        ValueError: there are not more images than neighbours.
    """
    if min(len(generated), len(real)) <= max(ks):
        raise ValueError(
            f"{max(ks)} neighbours need more images than {len(generated)} generated "
            f"and {len(real)} real ones"
        )
    centre = real.mean(0)  # distances stay, rounding errors of |x|^2 + |y|^2 - 2 x.y shrink
    generated = np.asarray(generated - centre, np.float32)
    real = np.asarray(real - centre, np.float32)
    radius_generated = _radii(generated, ks)
    radius_real = _radii(real, ks)

    inside = dict.fromkeys(ks, 0)
    balls = dict.fromkeys(ks, 0)
    recalled = {k: np.zeros(len(real), bool) for k in ks}
    covered = {k: np.zeros(len(real), bool) for k in ks}
    for rows, squared in _distances(generated, real):
        for k in ks:
            hits = squared <= radius_real[k]
            inside[k] += int(hits.any(1).sum())
            balls[k] += int(hits.sum())
            covered[k] |= hits.any(0)
            recalled[k] |= (squared <= radius_generated[k][rows, None]).any(0)
    N = len(generated)
    return {
        k: {
            "precision": inside[k] / N,
            "recall": float(recalled[k].mean()),
            "density": balls[k] / (k * N),
            "coverage": float(covered[k].mean()),
        }
        for k in ks
    }


def _radii(features: Array, ks: tuple[int, ...]) -> dict[int, Array]:
    """Squared distance of each row to its k-th nearest other row."""
    radii = {k: np.empty(len(features), np.float32) for k in ks}
    for rows, squared in _distances(features, features):
        squared.partition(sorted(ks), axis=1)  # column 0 is the row itself
        for k in ks:
            radii[k][rows] = squared[:, k]
    return radii


def _distances(x: Array, y: Array) -> Iterator[tuple[slice, Array]]:
    """Squared distances between the rows of x and of y, a block of x's rows at a time."""
    y_squared = np.einsum("nd,nd->n", y, y)
    for first in range(0, len(x), BLOCK):
        rows = slice(first, min(first + BLOCK, len(x)))
        block = x[rows] @ y.T
        block *= -2
        block += y_squared
        block += np.einsum("nd,nd->n", x[rows], x[rows])[:, None]
        yield rows, block.clip(0, out=block)

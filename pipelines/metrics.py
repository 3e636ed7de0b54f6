"""Metrics of generated images, from stored features: arrays in, numbers out.

Frechet distance, of pooled and of spatial features, Inception Score, kernel distance, precision,
recall, density and coverage. Those that torch-fidelity 0.4.0 has agree with it on equal features,
down to the same splits and subsets, but need neither a GPU nor all distances at once.

A covariance is singular where there are no more images than features, or where a feature is always
zero. The Frechet distance exists then too, and equals torch-fidelity's; but with N images its
expectation is too large by a term of order 1/N, which no longer is small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

SEED = 2020
"""torch-fidelity's seed; its order for the splits of IS and its subsets for KID follow from it."""

BLOCK = 2048
"""Side of the square of a distance matrix that exists at one time."""

TILE = 4096
"""Rows of features that are converted or centred at one time."""

NEIGHBOURS = (3, 5)
"""Sizes of the neighbourhoods of precision and its kin."""

RESAMPLES = 2000
"""Bootstrap samples behind an interval."""


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of outer products of features, in float64; they add up in any order."""

    count: int
    sum: Array
    outer: Array

    @classmethod
    def of(cls, features: Array) -> Moments:
        """Moments of features [N, D]."""
        width = features.shape[1]
        total, outer = np.zeros(width), np.zeros((width, width))
        for rows in _slices(len(features), TILE):
            f = features[rows].astype(np.float64)
            total += f.sum(0)
            outer += f.T @ f
        return cls(len(features), total, outer)

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
    root = _root(cov_1)
    trace_of_root = np.sqrt(np.linalg.eigvalsh(_congruent(root, cov_2)).clip(0)).sum()
    difference = mean_1 - mean_2
    return float(difference @ difference + np.trace(cov_1) + np.trace(cov_2) - 2 * trace_of_root)


def frechet_interval(
    features: Array, moments: Moments, mean: Array, cov: Array, level: float = 0.95
) -> tuple[float, float]:
    """How far the drawn images' own chance may move their Frechet distance: (below, above).

    The bootstrap over images, with the distance linearised at these images. The first-order
    influence of an image x on the distance is

        h(x) = 2 (m1 - m2).c + c^T (I - T) c,   c = x - m1,
        T = A (A^T S1 A)^(-1/2) A^T,   S2 = A A^T,

    and the distance of a resample is moved by the mean of its h. Plain resampling would need a
    matrix root for each resample, and would centre the interval too high: a resample holds fewer
    different images, and the bias of the distance is larger for fewer images. Neither that bias
    nor the chance in the reference is part of the interval.

    Args:
        features: of the generated images, [N, D].
        moments: theirs.
        mean, cov: of the reference.
        level: probability with which the interval is to hold.

    Returns:
        Ends of the interval as differences to the distance: one below zero, one above.
    """
    root = _root(cov)
    values, vectors = np.linalg.eigh(_congruent(root, moments.covariance))
    alive = values > values[-1] * len(values) * np.finfo(np.float64).eps
    # c^T T c is the squared length of c through this map.
    through = root @ (vectors[:, alive] / values[alive] ** 0.25)
    difference = 2 * (moments.mean - mean)
    influence = np.empty(len(features))
    for rows in _slices(len(features), TILE):
        c = features[rows] - moments.mean
        mapped = c @ through
        influence[rows] = (
            c @ difference + np.einsum("nd,nd->n", c, c) - np.einsum("nd,nd->n", mapped, mapped)
        )
    influence -= influence.mean()
    N, rng = len(features), np.random.default_rng(SEED)
    means = [influence[rng.integers(0, N, N)].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _root(cov: Array) -> Array:
    """A with A A^T = cov: the Cholesky factor, or by eigenvalues where cov is singular."""
    try:
        return np.linalg.cholesky(cov)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(cov)
        root: Array = vectors * np.sqrt(values.clip(0))
        return root


def _congruent(root: Array, cov: Array) -> Array:
    """root^T cov root, exactly symmetric."""
    product = root.T @ cov @ root
    return (product + product.T) / 2


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


class Statistics(NamedTuple):
    """Moments as reference files hold them."""

    mean: Array
    """[D]."""
    covariance: Array
    """[D, D]."""


class Real(NamedTuple):
    """What generated images are compared with."""

    pooled: Statistics
    """Of the pooled features of all real images."""
    spatial: Statistics | None = None
    """Of their spatial features, for sFD."""
    features: Array | None = None
    """Pooled features of some real images, [M, D], for what moments do not suffice for."""


def all_metrics(features: Array, logits: Array, spatial: Array, real: Real) -> dict[str, float]:
    """Every metric of generated images, by plain names; those that lack what they need are absent.

    Precision and its kin depend on both numbers of images: all N generated ones count, and all M
    real ones whose features are known. They need more than five of each.

    Args:
        features, logits, spatial: of the generated images, [N, D], [N, K] and [N, S]; K or S is 0
            where the extractor has no such output.
        real: statistics of the real images.
    """
    moments = Moments.of(features)
    distance = frechet_distance(moments.mean, moments.covariance, *real.pooled)
    low, high = frechet_interval(features, moments, *real.pooled)
    found = {"FD": distance, "FD_low": distance + low, "FD_high": distance + high}
    if real.spatial and spatial.shape[1]:
        moments = Moments.of(spatial)
        found["sFD"] = frechet_distance(moments.mean, moments.covariance, *real.spatial)
    if logits.shape[1]:
        found["IS"], found["IS_std"] = inception_score(logits)
    if real.features is not None and min(len(features), len(real.features)) > 1:
        found["KID"], found["KID_std"] = kernel_distance(features, real.features)
        if min(len(features), len(real.features)) > max(NEIGHBOURS):
            for k, values in neighbourhoods(features, real.features, NEIGHBOURS).items():
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
        generated, real: features [N, D] and [M, D]; only BLOCK x BLOCK distances exist at a time,
            so that 50,000 x 50,000 images of 2048 features fit in 2 GB.
        ks: sizes of the neighbourhood.

    Raises:
        ValueError: there are not more images than neighbours.
    """
    if min(len(generated), len(real)) <= max(ks):
        raise ValueError(
            f"{max(ks)} neighbours need more images than {len(generated)} generated "
            f"and {len(real)} real ones"
        )
    radius_generated = _radii(generated, ks)
    radius_real = _radii(real, ks)
    centre = _centre(real)

    N, M = len(generated), len(real)
    balls = dict.fromkeys(ks, 0)
    inside = {k: np.zeros(N, bool) for k in ks}
    recalled = {k: np.zeros(M, bool) for k in ks}
    covered = {k: np.zeros(M, bool) for k in ks}
    for rows in _slices(N, BLOCK):
        for columns in _slices(M, BLOCK):
            pair = generated[rows], real[columns]
            squared, slack = _distances(*pair, centre)
            for k in ks:
                hits = _within(squared, slack, radius_real[k][columns], pair)
                balls[k] += int(np.count_nonzero(hits))
                inside[k][rows] |= hits.any(1)
                covered[k][columns] |= hits.any(0)
                found = _within(squared, slack, radius_generated[k][rows, None], pair)
                recalled[k][columns] |= found.any(0)
    return {
        k: {
            "precision": float(inside[k].mean()),
            "recall": float(recalled[k].mean()),
            "density": balls[k] / (k * N),
            "coverage": float(covered[k].mean()),
        }
        for k in ks
    }


def _radii(features: Array, ks: tuple[int, ...]) -> dict[int, Array]:
    """Squared distance of each row to its k-th nearest other row, float64, as _exact has it.

    Distances are symmetric, so the blocks above the diagonal suffice: each tells its rows and its
    columns.
    """
    centre = _centre(features)
    most = max(ks) + 1  # one more, because the row itself is among its neighbours
    nearest = np.full((len(features), most), np.inf)

    def learn(rows: slice, columns: slice, squared: Array, slack: float) -> None:
        there = nearest[rows]
        furthest = there[:, -1:]
        # None is nearer than a copy: a collapsed model has many.
        near = squared <= np.where(furthest == 0, -1, furthest + slack).astype(np.float32)
        if np.count_nonzero(near) > 8 * len(near):  # little is known of these rows yet
            known = np.concatenate([there, squared], axis=1, dtype=np.float32)
            known.partition(most - 1, axis=1)
            near &= squared <= known[:, most - 1 : most] + np.float32(2 * slack)
        i, j = _where(near)
        exact = _exact(features[rows], features[columns], i, j)
        values = np.concatenate([there.ravel(), exact])
        owners = np.concatenate([np.repeat(np.arange(len(there)), most), i])
        order = np.lexsort((values, owners))
        first = np.searchsorted(owners[order], np.arange(len(there)))
        nearest[rows] = values[order][first[:, None] + np.arange(most)]

    blocks = _slices(len(features), BLOCK)
    for n, rows in enumerate(blocks):
        for columns in blocks[n:]:
            squared, slack = _distances(features[rows], features[columns], centre)
            learn(rows, columns, squared, slack)
            if columns != rows:
                learn(columns, rows, squared.T, slack)
    return {k: nearest[:, k] for k in ks}


def _within(squared: Array, slack: float, radius: Array, pair: tuple[Array, Array]) -> Array:
    """Whether distances are at most a radius, [N, M]; a tie is one, however float32 rounds it.

    Args:
        squared, slack: of a pair of features, as _distances gives them.
        radius: squared, float64, [M] or [N, 1].
        pair: the features, [N, D] and [M, D].
    """
    hits: Array = squared <= (radius - slack).astype(np.float32)
    perhaps = squared <= (radius + slack).astype(np.float32)
    if np.count_nonzero(hits) != np.count_nonzero(perhaps):
        i, j = _where(hits != perhaps)
        hits[i, j] = _exact(*pair, i, j) <= np.broadcast_to(radius, hits.shape)[i, j]
    return hits


def _where(mask: Array) -> tuple[Array, Array]:
    """np.nonzero of a block with few true places, in any order, in a fifth of the time."""
    if mask.flags.fnc:  # Fortran order, as a transposed view has it
        j, i = _where(mask.T)
    else:
        i, j = np.divmod(np.flatnonzero(mask), mask.shape[1])
    return i, j


def _exact(x: Array, y: Array, i: Array, j: Array) -> Array:
    """Squared distances of the rows x[i] and y[j], float64, from their differences.

    Equal ones are equal here where the features are few small whole numbers, or the differences
    the same but for their signs.
    """
    found = np.empty(len(i))
    for some in _slices(len(i), TILE // 16):
        difference = x[i[some]].astype(np.float64)
        difference -= y[j[some]]
        found[some] = np.square(difference, out=difference).sum(1)
    return found


def _centre(features: Array) -> Array:
    """Mean, [D]. Without it distances stay, but the slack of _distances shrinks."""
    return features.mean(0, dtype=np.float64).astype(np.float32)


def _distances(x: Array, y: Array, centre: Array) -> tuple[Array, float]:
    """Squared distances between the rows of x and of y, [N, M], float32; how far they may be off.

    They are |a|^2 + |b|^2 - 2 a.b. A sum of D products is off by some times the root of D, times
    u, times the sum of their sizes, u being float32's unit roundoff (Higham and Mary, 2019): 8 is
    met once in 10^13. The 16 allows for the centring, the last additions, and the rounding of what
    is compared with it.
    """
    a, b = (np.asarray(side - centre, np.float32) for side in (x, y))
    squared: Array = (-2 * a) @ b.T
    size_a, size_b = (np.einsum("nd,nd->n", side, side) for side in (a, b))
    squared += size_b
    squared += size_a[:, None]
    roundoff = (8 * a.shape[1] ** 0.5 + 16) * 2.0**-24
    slack = roundoff * float(size_a.max() ** 0.5 + size_b.max() ** 0.5) ** 2
    return squared.clip(0, out=squared), slack + float(np.finfo(np.float32).tiny)


def _slices(rows: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]

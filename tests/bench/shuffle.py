"""How well the training order mixes, beside a full permutation: ImageNet's numbers, no images.

Two datasets: as `jit prepare` makes it, which permutes the images before it deals them to shards,
and one whose rows lie sorted by class, the worst there is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.order import Order

ROWS, CLASSES, GROUP, LANES, WINDOW, BATCH = 1_281_167, 1000, 64, 64, 4, 1024
LAGS = 4096


def entropy(labels: NDArray[np.int64], batch: int, classes: int) -> NDArray[np.float64]:
    """Bits of the label distribution inside each whole batch."""
    found = []
    for start in range(0, len(labels) // batch * batch, batch):
        p = np.bincount(labels[start : start + batch], minlength=classes) / batch
        p = p[p > 0]
        found.append(-(p * np.log2(p)).sum())
    return np.array(found)


def autocorrelation(values: NDArray[Any], lags: int) -> NDArray[np.float64]:
    """Autocorrelation of a sequence at lags 1 .. lags, by FFT."""
    x = values.astype(np.float64) - values.mean()
    spectrum = np.fft.rfft(x, 2 * len(x))
    products = np.fft.irfft(spectrum * spectrum.conj())[1 : lags + 1]
    return products / (x @ x)


def run() -> dict[str, Any]:
    groups = [GROUP] * (ROWS // GROUP) + ([ROWS % GROUP] if ROWS % GROUP else [])
    group, row = Order(groups, seed=0, lanes=LANES, window=WINDOW).rows(0, ROWS)
    rng = np.random.default_rng(0)
    orders = {"lanes": group * GROUP + row, "full permutation": rng.permutation(ROWS)}
    by_class = np.arange(ROWS) * CLASSES // ROWS
    datasets = {"as prepared": by_class[rng.permutation(ROWS)], "sorted by class": by_class}
    rows = []
    for dataset, labels in datasets.items():
        for order, position in orders.items():
            bits = entropy(labels[position], BATCH, CLASSES)
            rows.append(
                {
                    "dataset": dataset,
                    "order": order,
                    "label entropy of a batch, bits": round(float(bits.mean()), 3),
                    "least": round(float(bits.min()), 3),
                    f"largest autocorrelation of labels, lags to {LAGS}": round(
                        float(np.abs(autocorrelation(labels[position], LAGS)).max()), 4
                    ),
                    "of places": round(float(np.abs(autocorrelation(position, LAGS)).max()), 4),
                }
            )
    title = (
        f"one epoch of {ROWS} images, {CLASSES} classes, batch {BATCH}; {LANES} lanes, window of "
        f"{WINDOW} row groups of {GROUP}"
    )
    return {"title": title, "rows": rows}

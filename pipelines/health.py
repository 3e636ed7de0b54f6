"""Whether drawn images look like a failure that is known: grey, saturated, or with seams.

Scores are compared with those of real images of the dataset, as what is normal differs: most of a
photograph of a shoe on white is white. Arrays in, numbers and sentences out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

GREY = 0.35
"""Images with less than this part of the real images' contrast are called grey."""
SATURATED = 0.2
"""So much more of the values at 0 or 255 than in real images is called saturation."""
SEAMS = 0.3
"""So much more correlation at the patch period than in real images is called seams."""


class Health(NamedTuple):
    """Scores of a set of images."""

    contrast: float
    """Standard deviation inside an image, as a part of 255; mean over the images."""
    clipped: float
    """Part of the values that are 0 or 255."""
    seams: float
    """Autocorrelation of edges at the patch period, -1..1."""


def measure(pixels: NDArray[np.uint8], patch_size: int) -> Health:
    """Scores of images, uint8 [N, 3, H, W]."""
    x = pixels.astype(np.float32)
    return Health(
        contrast=float(x.std(axis=(1, 2, 3)).mean() / 255),
        clipped=float(((pixels == 0) | (pixels == 255)).mean()),
        seams=seam_score(x, patch_size),
    )


def seam_score(x: NDArray[np.float32], patch_size: int) -> float:
    """How much stronger edges come back with the period of the patches, mean of both axes.

    d_j, the mean absolute step between pixels j and j + 1 over all images, rows and channels, has a
    peak at every patch border if there are seams. Of d, less its mean over a patch around each
    place, so that objects in the middle do not matter, this is the autocorrelation at a lag of one
    patch.

    Args:
        x: images, [N, C, H, W].
        patch_size: at least 2; 0 is the answer where there are less than three patches.
    """
    scores = []
    for steps in (np.abs(np.diff(x, axis=3)), np.abs(np.diff(x.swapaxes(2, 3), axis=3))):
        d = steps.mean(axis=(0, 1, 2), dtype=np.float64)
        if patch_size < 2 or len(d) < 3 * patch_size - 1:
            return 0.0
        around = np.convolve(d, np.full(patch_size, 1 / patch_size), "valid")
        d = d[patch_size // 2 :][: len(around)] - around
        d -= d.mean()
        energy = float(d @ d)
        # Lags differ in how many products they sum: the mean product makes them comparable.
        product = float(d[patch_size:] @ d[:-patch_size]) * len(d) / (len(d) - patch_size)
        scores.append(product / energy if energy > 1e-12 else 0.0)
    return float(np.clip(np.mean(scores), -1, 1))


def findings(drawn: Health, real: Health) -> list[str]:
    """What is wrong with drawn images, in sentences that name the numbers and a remedy."""
    found = []
    if drawn.clipped > real.clipped + SATURATED:
        found.append(
            f"the images are saturated ({drawn.clipped:.0%} of the values at 0 or 255, "
            f"real ones {real.clipped:.0%}): lower sampler.cfg_scale or narrow sampler.cfg_interval"
        )
    if drawn.contrast < GREY * real.contrast:  # and then edges mean little
        found.append(
            f"the images are grey (contrast {drawn.contrast:.3f}, real ones {real.contrast:.3f}): "
            "normal in the first epochs, and with an average whose decay is long against the run; "
            "later, look at the learning rate and at flow.noise_scale"
        )
    elif drawn.seams > real.seams + SEAMS:
        found.append(
            f"the images have seams at the patch borders (score {drawn.seams:.2f}, real ones "
            f"{real.seams:.2f}): train longer, use a smaller patch, or a larger bottleneck_dim"
        )
    return found

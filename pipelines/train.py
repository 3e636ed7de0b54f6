"""Dataset folder -> run folder, on a Ray cluster: `fit` in as many processes as there are workers.

Ray Train places the processes, joins them by torch.distributed and starts them again when one
dies; everything else is pipelines/fit.py. What Ray itself notes goes to `ray/` in the run folder
and is deleted at the end: a run is continued from its own checkpoints.

What can be refused is refused before a process starts: a dataset that is not there, a run that was
started with other options, a storage that cannot be written, more workers than the cluster has.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what is slow to import: `--help` shall not wait for it
    import sys

    from pipelines.cli import main

    raise SystemExit(main(["train", *sys.argv[1:]]))

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any, cast

import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch
import yaml
from ray._private.worker import get_dashboard_url
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

from jitmodel.parallel import tune_cpu
from pipelines import checkpoints, lease, runtime, storage, trackers, validation
from pipelines.checkpoints import CONFIG, FOLDER, LATEST, META, Checkpoint, SaveFailed
from pipelines.config import StageFailed, TrainConfig, ValidationConfig, require
from pipelines.fit import check_fits, early_stop, fit, resume_point, run_uri
from pipelines.loader import DamagedData
from pipelines.meter import NonFiniteLoss
from pipelines.shards import Manifest, check_there, read_manifest

logger = logging.getLogger(__name__)


WRITER = "writer"
"""Where a run folder names the command that trains it."""
NOTES = "ray"
"""Where a run folder holds what Ray itself notes."""
WATCH_PREEMPTION = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
ASK_EVERY_S = 5.0
ELASTIC_START_S = 30.0
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


class RayContext:
    """A process of Ray Train, as fit sees it.

    Args:
        judged: whether checkpoints are validated.
        writer: folder and number of the lease under which the run is written.
    """

    def __init__(self, *, judged: bool = False, writer: tuple[str, int] | None = None) -> None:
        self.judged, self.writer = judged, writer
        self._steps, self._asked, self._ask_at = 0, time.monotonic(), 1
        self._leaving: set[str] = set()
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()

    def report(self, metrics: dict[str, Any], checkpoint: str) -> None:
        """Tell Ray; the checkpoint is in the run folder already.

        Ray validates only what it stores itself, so it gets a pointer in place of the checkpoint.
        """
        if not self.judged or self.rank:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory(prefix="jit-pointer-") as folder:
            Path(folder, "pointer.json").write_text(json.dumps({"checkpoint": checkpoint}))
            ray.train.report(
                metrics,
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                validation=ray.train.ValidationTaskConfig(fn_kwargs={"uri": checkpoint}),
            )

    def preempted(self) -> bool:
        """Whether one more node of this run will be taken away; asked about every five seconds.

        The question is a barrier through an actor, too slow for every step; a cloud gives notice
        of one minute or two. When to ask next is what rank 0 says, as all must ask alike.
        """
        self._steps += 1
        if self._steps < self._ask_at or os.environ.get(WATCH_PREEMPTION) == "0":
            return False
        now = time.monotonic()
        steps = max(1, round(ASK_EVERY_S * self._steps / (now - self._asked + 1e-9)))
        steps = ray.train.collective.broadcast_from_rank_zero(min(steps, 10 * self._steps))
        self._steps, self._asked, self._ask_at = 0, now, steps
        info = ray.train.get_preemption_info()
        known, self._leaving = self._leaving, set(info.preempted_node_to_ranks) if info else set()
        return not self._leaving <= known

    def check_alone(self) -> None:
        """Workers outlive a command that was killed by some seconds; the next may be at work.

        Raises:
            PermissionError: another command took over the run.
        """
        if self.writer:
            lease.check_newest(*self.writer)


class WholeLanes(ElasticScalingPolicy):
    """As many workers as there is room for, of the numbers that share lanes and batch evenly.

    Room for `spare` more is left free: a checkpoint that is judged needs a place, too.
    """

    def __init__(self, scaling_config: Any, numbers: list[int], spare: int) -> None:
        super().__init__(scaling_config)
        self.numbers, self.spare = numbers, spare

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        # What is reserved may be on a node that has died since.
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        alive = {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}
        there = {node: kinds for node, kinds in reserved_resources.items() if node in alive}
        kind = "GPU" if self.scaling_config.use_gpu else "CPU"
        places = int(sum(kinds.get(kind, 0) for kinds in alive.values())) - self.spare
        room = min(super()._count_possible_workers(there), places)
        return max((number for number in self.numbers if number <= room), default=0)


class FailuresInARow(DefaultFailurePolicy):
    """Ray's count of failed workers, begun again with every new checkpoint of a run.

    Weeks on machines that come and go meet any number of failures; what ends a run is one that
    comes back before anything was gained.
    """

    def __init__(self, failure_config: Any, run: str) -> None:
        super().__init__(failure_config)
        self.run, self.seen = run, checkpoints.latest_images(run)

    def make_decision(self, training_failed_error: Any) -> Any:
        """Whether to start the workers again; damaged data they would only meet again."""
        if damage(training_failed_error):
            return FailureDecision.RAISE
        seen = checkpoints.latest_images(self.run)
        if seen > self.seen:
            self.seen, self._worker_group_failures = seen, 0
        return super().make_decision(training_failed_error)


def damage(error: Any) -> DamagedData | None:
    """What is damaged, if that is why workers failed; others fail because one of them did."""
    failures = getattr(error, "worker_failures", {}).values()
    return next((failure for failure in failures if isinstance(failure, DamagedData)), None)


class Trainer(ray.train.torch.TorchTrainer):
    """Ray's trainer, with three changes.

    The actor that asks the dashboard every second is left out where there is none. It frees the
    workers' places when the trainer itself is killed; in a cluster that a command started for
    itself, without a dashboard, everything ends with that command.

    An elastic run has one of `numbers` of workers at any time, and leaves `spare` places free.

    Failures are counted from the newest checkpoint of `run`, and damaged data ends it at once.
    """

    numbers: list[int]
    spare: int
    run: str

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        failures = self.run_config.failure_config
        parts["failure_policy"] = FailuresInARow(failures, self.run)
        if len(self.numbers) > 1:
            parts["scaling_policy"] = WholeLanes(self.scaling_config, self.numbers, self.spare)
        return super()._initialize_and_run_controller(**parts)  # type: ignore[misc]

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        if get_dashboard_url():  # type: ignore[no-untyped-call]
            return callbacks
        return [c for c in callbacks if not isinstance(c, PlacementGroupCleanerCallback)]


def worker(options: dict[str, Any], writer: tuple[str, int] | None = None) -> dict[str, Any]:
    """What each process runs; the answer of rank 0 is the answer of the run.

    Args:
        options: those of TrainConfig.
        writer: see RayContext.
    """
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train's own reports are not news
    logging.getLogger("pipelines").setLevel(logging.INFO)
    config = TrainConfig.model_validate(options)
    context = RayContext(judged=bool(config.validation.reference), writer=writer)
    if context.device.type == "cpu":
        cpus = len(os.sched_getaffinity(0))
        tune_cpu(max(1, cpus // ray.train.get_context().get_local_world_size()))
    try:
        result = fit(config, context)
    except (NonFiniteLoss, SaveFailed) as error:  # to start again would only meet it again
        return {"stopped": str(error)}
    return {
        "images_seen": result.images_seen,
        "checkpoint": result.checkpoint,
        "early": result.stopped,
    }


def judge(checkpoint: ray.train.Checkpoint, uri: str, options: dict[str, Any]) -> dict[str, float]:
    """What a validation task runs, on a device of its own, while training goes on."""
    logging.getLogger("pipelines").setLevel(logging.INFO)
    try:
        score = validation.validate_apart(uri, ValidationConfig.model_validate(options))
    except validation.JudgeDied as error:
        logger.warning("%s is not judged, training goes on: %s", uri, error)
        return {}
    except FileNotFoundError as error:
        if storage.exists(storage.join(uri, META)):
            raise  # the reference or the extractor is not to be had on this machine
        # What is not among the newest any more may be deleted.
        logger.warning("%s is not judged: %s", uri, error)
        return {}
    logger.info("%s at image %d: %.4g", score.metric, score.images_seen, score.value)
    return {score.metric: score.value}


def run(config: TrainConfig) -> None:
    """Train, or go on training, until the run has seen all its images.

    Raises:
        FileNotFoundError: there is no dataset, or no run to go on with.
        ValueError: options that do not fit the dataset, the run so far, or the cluster; a tracker
            that is not installed; a dataset that lacks shards; a run folder that is not a run's.
        PermissionError: the storage cannot be written, or another command trains this run.
        StageFailed: training diverged, data are damaged, a checkpoint could not be stored, or
            workers failed more often than max_failures.
    """
    require(config, "data", "storage", "name")
    if "/" in config.name or config.name.startswith("."):
        raise ValueError(f"--name {config.name!r} is not the name of a folder: leave out / and .")
    config = config.model_copy(
        update={"data": _absolute(config.data), "storage": _absolute(config.storage)}
    )
    manifest, folder = read_manifest(config.data), run_uri(config)
    check_fits(config, manifest)
    check_there(config.data, manifest)
    check_ours(config)
    if not config.dry_run:
        storage.check_writable(folder)
    trackers.check_installed(config)
    if config.validation.reference:
        validation.check(config, manifest)
    start = None if config.fresh else resume_point(config, manifest)
    if config.resume and not start:
        raise FileNotFoundError(
            f"--resume, but no run with a checkpoint is at {folder}: {config.storage} holds "
            f"{', '.join(runs(config.storage)) or 'no runs'}"
        )
    if config.dry_run:
        print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        print(plan(config, manifest, start))
        return
    if start and start.meta.images_seen >= config.total_images:
        longer = "raise --total-images to go on, or "
        if config.optimizer.schedule != "constant":  # a longer run would be another one
            longer = ""
        logger.info(
            "%s is finished: it has seen %d of %d images. Export it with `jit export %s --ema %g "
            "--output FOLDER`; %sadd --fresh to start over.",
            folder,
            start.meta.images_seen,
            config.total_images,
            folder,
            config.optimizer.ema_decays[-1] if config.optimizer.ema_decays else 0,
            longer,
        )
        return
    if start and (why := early_stop(config)):
        again = "Raise --validation.patience to go on."
        logger.info("%s is finished: %s%s. %s", folder, why, best_of(config), again)
        return
    runtime.connect()
    use_gpu = place(config)
    if config.fresh and storage.exists(folder):
        with lease.claim(storage.join(folder, WRITER)):
            logger.info("--fresh: the old run is now at %s", move_aside(folder))
    with lease.claim(storage.join(folder, WRITER)) as held:
        logger.info(plan(config, manifest, start))
        writer = held.folder, held.number
        answer = launch(config, use_gpu=use_gpu, worker=lambda options: worker(options, writer))
    if "stopped" in answer:
        raise StageFailed(answer["stopped"])
    if answer["early"]:
        logger.info("stopped early: %s%s", answer["early"], best_of(config))
    logger.info("finished: %d images, %s", answer["images_seen"], answer["checkpoint"])


def launch(
    config: TrainConfig,
    *,
    use_gpu: bool,
    worker: Callable[[dict[str, Any]], dict[str, Any]] = worker,
) -> dict[str, Any]:
    """Run `worker` in every process under Ray Train; the answer of rank 0.

    Raises:
        StageFailed: workers failed more often than max_failures, or met damaged data.
    """
    numbers = config.world_sizes
    # A lost node is counted as room until its silence is noticed. An elastic run that wants its
    # place looks again after a short while; another one waits for a new node.
    patience_s, retries = config.start_timeout_s, 0
    if len(numbers) > 1:
        patience_s = min(patience_s, ELASTIC_START_S)
        retries = round(config.start_timeout_s / patience_s)
    os.environ[START_TIMEOUT] = str(patience_s)
    if not get_dashboard_url():  # type: ignore[no-untyped-call]
        # Nobody announces the end of a cluster of one's own.
        os.environ[WATCH_PREEMPTION] = "0"
    notes = storage.join(run_uri(config), NOTES)
    system, path = storage.filesystem(notes)
    # The ignored types are those of Train V1, which ray.train shows to a type checker.
    trainer = Trainer(
        worker,  # type: ignore[arg-type]
        train_loop_config=config.model_dump(mode="json"),
        torch_config=ray.train.torch.TorchConfig(
            backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo"
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cast(Any, numbers[0] if len(numbers) == 1 else (numbers[0], numbers[-1])),
            use_gpu=use_gpu,
            elastic_resize_monitor_interval_s=config.resize_every_s,  # type: ignore[call-arg]
        ),
        run_config=ray.train.RunConfig(
            name=time.strftime("%Y%m%dT%H%M%S"),
            storage_path=path,
            storage_filesystem=system,
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            # Without a limit, a controller that cannot place its workers tries for ever.
            failure_config=ray.train.FailureConfig(  # type: ignore[call-arg]
                max_failures=config.max_failures, controller_failure_limit=retries
            ),
        ),
        validation_config=validated(config.validation, use_gpu=use_gpu),
    )
    trainer.run, trainer.numbers = run_uri(config), numbers
    trainer.spare = int(bool(config.validation.reference))
    try:
        answer: dict[str, Any] = trainer.fit().return_value  # type: ignore[attr-defined]
    except ray.train.TrainingFailedError as error:
        if found := damage(error):
            raise StageFailed(f"training of {run_uri(config)} stopped: {found}") from error
        raise StageFailed(
            f"training of {run_uri(config)} failed: {error}\nThe same line again goes on from the "
            "newest checkpoint, or begins where there is none."
        ) from error
    finally:
        storage.delete(notes)
    return answer


def validated(config: ValidationConfig, *, use_gpu: bool) -> ray.train.ValidationConfig | None:
    """How Ray validates checkpoints, if it shall."""
    if not config.reference:
        return None
    return ray.train.ValidationConfig(
        judge,  # type: ignore[arg-type]
        ray.train.ValidationTaskConfig(fn_kwargs={"options": config.model_dump(mode="json")}),
        ray_remote_kwargs={"num_cpus": 1, "num_gpus": int(use_gpu), "max_retries": -1},
    )


def place(config: TrainConfig) -> bool:
    """Whether workers get a GPU each, or a CPU each where the cluster has no GPU.

    Raises:
        ValueError: the cluster has too few, and cannot grow.
    """
    most = runtime.capacity()
    kind = "GPU" if most["GPU"] else "CPU"
    fewest, judges = config.world_sizes[0], int(bool(config.validation.reference))
    if fewest + judges > most[kind]:
        also = " and the validation of checkpoints" if judges else ""
        raise ValueError(
            f"--workers {config.workers}, but the cluster has {most[kind]:.0f} {kind}s and each "
            f"worker{also} needs one: use at most {most[kind] - judges:.0f} workers, or a larger "
            "cluster"
        )
    return kind == "GPU"


def plan(config: TrainConfig, manifest: Manifest, start: Checkpoint | None) -> str:
    """What a run will do, in words."""
    each = " or ".join(
        "{} workers x {} images x {}".format(n, *config.split(n)) for n in config.world_sizes
    )
    seen = start.meta.images_seen if start else 0
    steps = -(-(config.total_images - seen) // config.global_batch)
    where = f"going on from {start.uri} at" if start else "a new run, starting at"
    return (
        f"{run_uri(config)}: {where} image {seen} of {config.total_images} "
        f"({config.total_images / manifest.num_rows:.2f} epochs of {manifest.num_rows}), "
        f"{steps} steps of {config.global_batch} = {each}"
    )


def best_of(config: TrainConfig) -> str:
    """The checkpoint that a run which stopped early is about, for the end of a sentence."""
    found = validation.scores(run_uri(config), config.validation, config.sampler)
    there = checkpoints.complete(run_uri(config))
    kept = [score for score in found if score.step in there]
    if not kept:
        return ""
    uri = there[validation.best(kept, 1)[0].step]
    return f"; the best is {uri}: `jit export {uri} --ema {config.validation.ema:g} --output URI`"


def runs(uri: str) -> list[str]:
    """Names of the runs in a storage that have stored a checkpoint."""
    try:
        names, _ = storage.list_folder(uri)
    except FileNotFoundError:
        return []
    return [name for name in names if storage.exists(storage.join(uri, name, LATEST))]


def check_ours(config: TrainConfig) -> None:
    """Refuse a run folder that --fresh would take away from somebody else, or a run would fill.

    Raises:
        ValueError: it meets the dataset's, or holds something, but nothing of a run.
    """
    folder = run_uri(config)
    run, data = _resolved(folder), _resolved(config.data)
    if run.is_relative_to(data) or data.is_relative_to(run):
        raise ValueError(
            f"--storage and --name make {folder} the run folder, and the dataset is at "
            f"{config.data}: neither may hold the other. Choose another --storage or --name."
        )
    try:
        folders, files = storage.list_folder(folder)
    except FileNotFoundError:
        return
    # All that a run leaves that was killed before it wrote its config; what begins with a dot is
    # unfinished, or the machine's.
    begun = (WRITER, NOTES)
    there = [name for name in (*folders, *(file.relative for file in files)) if name[0] != "."]
    foreign = [name for name in there if name not in begun]
    if foreign and not {CONFIG, FOLDER, LATEST} & set(there):
        raise ValueError(
            f"{folder} is not a run folder: it holds {', '.join(foreign[:8])}"
            f"{' ...' if len(foreign) > 8 else ''}, but neither {CONFIG} nor {FOLDER}/ nor "
            f"{LATEST}. Choose another --storage or --name, or empty it."
        )


def _resolved(uri: str) -> PurePath:
    """What tells whether two URIs lie in each other, whatever links lead there."""
    path = storage.local_path(uri)
    return PurePath(uri) if path is None else path.resolve()


def move_aside(uri: str) -> str:
    """Give a run folder another name; the new one."""
    new = f"{uri}.before-{time.strftime('%Y%m%dT%H%M%S')}"
    path = storage.local_path(uri)
    if path is not None:
        path.rename(new)
        return new
    for entry in storage.list_files(uri):
        storage.copy(entry.uri, storage.join(new, entry.relative))
    storage.delete(uri)
    return new


def _absolute(uri: str) -> str:
    """Workers have another current folder."""
    path = storage.local_path(uri)
    return uri if path is None else str(Path.cwd() / path)

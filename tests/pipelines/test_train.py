import json
import os
import shutil
import signal
import uuid
from pathlib import Path
from unittest import mock

import pytest
import ray.train
import torch
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2.api.exceptions import WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from jitmodel.config import FlowConfig, ModelConfig, OptimizerConfig
from pipelines import checkpoints, fit, lease, storage, train
from pipelines.config import StageFailed, TrainConfig, load_preset


def config_for(data: Path, store: Path, name: str, **changes) -> TrainConfig:
    """Ten steps of 16 images on two workers; a checkpoint every third step."""
    options = {
        "data": str(data),
        "storage": str(store),
        "name": name,
        "workers": 2,
        "model": ModelConfig(
            image_size=28, patch_size=14, hidden_size=32, depth=2, num_heads=2, bottleneck_dim=16,
            in_context_len=2, in_context_start=1, num_classes=10,
        ),
        "optimizer": {"learning_rate": 1e-3, "warmup_images": 64, "ema_decays": (0.9,)},
        "loader": {"lanes": 4, "window": 2},
        "sampler": {"steps": 2},
        "parallel": {"precision": "fp32"},
        "global_batch": 16,
        "micro_batch": 4,
        "total_images": 160,
        "checkpoint_every_images": 48,
        "grid_every_images": 160,
        "grid_ema": 0.9,
        "log_every_steps": 1,
    }  # fmt: skip
    return TrainConfig.model_validate(options | changes)


def recording(folder: str, *, killed: bool):
    """A worker that writes down its ids, and whose rank 1 is killed once, in the fifth step."""

    def worker(options: dict) -> dict:
        on = fit._on

        def write_down(device, batch):
            rank = os.environ.get("RANK", "0")
            with Path(folder, f"ids-{rank}.jsonl").open("a") as file:
                file.write(json.dumps([batch.index.tolist(), batch.id.tolist()]) + "\n")
            marker = Path(folder, "killed")
            if killed and rank == "1" and 64 in batch.index - 2 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return on(device, batch)

        fit._on = write_down
        return train.worker(options)

    return worker


def ids_by_index(folder: Path) -> dict[int, set[int]]:
    """Every id that was ever drawn for a place in the run."""
    drawn: dict[int, set[int]] = {}
    for file in folder.glob("ids-*.jsonl"):
        for line in file.read_text().splitlines():
            for index, id in zip(*json.loads(line), strict=True):
                drawn.setdefault(index, set()).add(id)
    return drawn


def tensors(config: TrainConfig) -> dict[str, torch.Tensor]:
    found = checkpoints.newest(fit.run_uri(config))
    assert found is not None
    assert found.meta.images_seen == 160
    return checkpoints.read(found.uri, "")


@pytest.mark.ray
def test_a_run_whose_worker_is_killed_ends_as_if_nothing_had_happened(
    ray_cluster, tiny_dataset, tmp_path, caplog
):
    whole = config_for(tiny_dataset, tmp_path, "whole")
    broken = config_for(tiny_dataset, tmp_path, "broken")
    for name in ("ids-whole", "ids-broken"):
        (tmp_path / name).mkdir()

    train.launch(whole, use_gpu=False, worker=recording(str(tmp_path / "ids-whole"), killed=False))
    answer = train.launch(
        broken, use_gpu=False, worker=recording(str(tmp_path / "ids-broken"), killed=True)
    )

    assert (tmp_path / "ids-broken" / "killed").exists()
    assert answer["images_seen"] == 160
    there, here = tensors(whole), tensors(broken)
    assert there.keys() == here.keys()
    for name, tensor in there.items():
        assert torch.equal(here[name], tensor), name
    drawn = ids_by_index(tmp_path / "ids-broken")
    assert drawn == ids_by_index(tmp_path / "ids-whole")
    assert sorted(drawn) == list(range(160))
    assert {len(ids) for ids in drawn.values()} == {1}
    lines = (tmp_path / "broken/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["images_seen"] for line in lines] == list(range(16, 161, 16))
    assert not (tmp_path / "broken/ray").exists()

    # The same line again has nothing to do and starts nothing.
    with caplog.at_level("INFO"):
        train.run(whole)
    assert "is finished: it has seen 160 of 160 images" in caplog.text


@pytest.mark.ray
def test_damaged_data_end_a_run_at_once_with_one_sentence(ray_cluster, tiny_dataset, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(tiny_dataset, data)
    shard = data / "data/train-00002-of-00003.parquet"
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b"\x89PNG", b"JUNK"))
    starts = tmp_path / "starts"
    starts.mkdir()

    def counted(options: dict) -> dict:
        (starts / uuid.uuid4().hex).touch()
        return train.worker(options)

    with pytest.raises(StageFailed, match=r"stopped: row \d+ in row group \d .*-00002.* no image"):
        train.launch(config_for(data, tmp_path, "run"), use_gpu=False, worker=counted)

    assert len(list(starts.iterdir())) == 2  # each of two workers, once


def test_failures_end_a_run_when_nothing_was_gained_between_them(tmp_path):
    def fails() -> bool:
        lost = WorkerGroupError("a worker died", {0: RuntimeError("gone")})
        return policy.make_decision(lost) == FailureDecision.RAISE

    policy = train.FailuresInARow(ray.train.FailureConfig(max_failures=2), str(tmp_path))

    assert [fails(), fails()] == [False, False]
    for images in (32, 64):
        latest = checkpoints.Latest(checkpoint="checkpoints/step", images_seen=images)
        storage.write_json(str(tmp_path / "latest.json"), latest.model_dump())
        assert [fails(), fails()] == [False, False]
    assert fails()
    # A run that goes on has gained nothing yet.
    policy = train.FailuresInARow(ray.train.FailureConfig(max_failures=2), str(tmp_path))
    assert [fails(), fails(), fails()] == [False, False, True]


@pytest.mark.ray
@pytest.mark.slow
def test_a_fresh_start_keeps_the_old_run_under_another_name(ray_cluster, tiny_dataset, tmp_path):
    config = config_for(tiny_dataset, tmp_path, "run", total_images=48, workers=1)
    train.run(config)

    train.run(config.model_copy(update={"fresh": True, "total_images": 16, "seed": 1}))

    aside = next(tmp_path.glob("run.before-*"))
    assert (aside / "checkpoints/step_00000003/meta.json").exists()
    found = checkpoints.newest(str(tmp_path / "run"))
    assert found is not None
    assert (found.meta.images_seen, found.meta.config["seed"]) == (16, 1)
    assert storage.read_json(str(tmp_path / "run/first.json"))["images_seen"] == 16


@pytest.mark.ray
@pytest.mark.parametrize("fresh", [False, True])
def test_a_run_that_another_command_trains_is_left_alone(
    ray_cluster, tiny_dataset, tmp_path, fresh: bool
):
    config = config_for(tiny_dataset, tmp_path, "run", workers=1, fresh=fresh)

    with lease.claim(str(tmp_path / "run" / train.WRITER)):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(PermissionError, match=f"is being written by .*process {os.getpid()} "):
            train.run(config)

    assert sorted(tmp_path.rglob("*")) == before


def test_more_workers_than_the_cluster_has_cpus_are_refused_at_once(
    ray_cluster, tiny_dataset, tmp_path
):
    config = config_for(
        tiny_dataset, tmp_path, "run", workers=8, loader={"lanes": 8}, global_batch=16
    )

    with pytest.raises(ValueError, match=r"--workers 8, but the cluster has 4 CPUs"):
        train.run(config)

    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_the_plan_and_touches_nothing(tiny_dataset, tmp_path, capsys):
    train.run(config_for(tiny_dataset, tmp_path, "run", dry_run=True))

    printed = capsys.readouterr().out
    assert "global_batch: 16" in printed
    assert "a new run, starting at image 0 of 160 (0.76 epochs of 211)" in printed
    assert "10 steps of 16 = 2 workers x 4 images x 2" in printed
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_refused_before_ray_is_asked(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(train.runtime, "connect", lambda: pytest.fail("Ray was asked"))
    config = config_for(tiny_dataset, tmp_path, "run")

    with pytest.raises(FileNotFoundError, match="no manifest at"):
        train.run(config.model_copy(update={"data": str(tmp_path)}))
    with pytest.raises(ValueError, match="--storage is missing"):
        train.run(config.model_copy(update={"storage": ""}))
    with pytest.raises(ValueError, match=r"--name 'a/b' is not the name of a folder"):
        train.run(config.model_copy(update={"name": "a/b"}))
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="cannot write to"):
        train.run(config.model_copy(update={"storage": str(tmp_path / "file")}))
    (tmp_path / "data").mkdir()
    shutil.copy(tiny_dataset / "manifest.json", tmp_path / "data")
    with pytest.raises(ValueError, match=r"does not fit its manifest.json: it names data/train-0"):
        train.run(config.model_copy(update={"data": str(tmp_path / "data")}))
    assert not (tmp_path / "run").exists()


def test_a_fresh_start_that_cannot_be_made_leaves_the_old_run_in_its_place(
    tiny_dataset, tmp_path, monkeypatch
):
    monkeypatch.setattr(train.runtime, "connect", lambda: pytest.fail("Ray was asked"))
    config = config_for(tiny_dataset, tmp_path, "run", total_images=16)
    fit.fit(config, fit.LocalContext())
    wide = {"model": config.model.model_copy(update={"num_classes": 12}), "fresh": True}

    for dry_run in (True, False):
        with pytest.raises(ValueError, match=r"has num_classes 10, but model.num_classes is 12"):
            train.run(config.model_copy(update=wide | {"dry_run": dry_run}))

    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("data", None, r"make .*/data the run folder, and the dataset is at .*/link: neither may"),
        ("link", None, r"make .*/link the run folder"),
        ("inside", None, r"make .*/data/inside the run folder"),
        ("around", None, r"make .* the run folder, and the dataset is at .*: neither may hold"),
        ("artifact", "config.json", r"artifact is not a run folder: it holds config.json, but nei"),
        ("evaluation", "features/part.parquet", r"evaluation is not a run folder: it holds featur"),
    ],
)
@pytest.mark.parametrize("changes", [{"fresh": True}, {}, {"fresh": True, "dry_run": True}])
def test_a_folder_that_is_no_run_s_is_neither_moved_nor_written_to(
    tiny_dataset, tmp_path, monkeypatch, name: str, file: str | None, message: str, changes: dict
):
    monkeypatch.setattr(train.runtime, "connect", lambda: pytest.fail("Ray was asked"))
    shutil.copytree(tiny_dataset, tmp_path / "data")
    (tmp_path / "link").symlink_to("data")
    if file:
        (tmp_path / name / file).parent.mkdir(parents=True)
        (tmp_path / name / file).write_text("theirs")
    store = {"inside": tmp_path / "data", "around": tmp_path.parent}.get(name, tmp_path)
    run = tmp_path.name if name == "around" else name
    config = config_for(tmp_path / "link", store, run, **changes)
    before = sorted(tmp_path.rglob("*"))

    with pytest.raises(ValueError, match=message):
        train.run(config)

    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "left",
    [(), ("writer/00001.json",), ("writer/00001.json", "ray/a", ".saving-0/b"),
     ("config.yaml", "notes.txt"), ("checkpoints/step_00000001/meta.json",), ("latest.json",)],
)  # fmt: skip
def test_whatever_a_killed_run_left_is_a_run_s_folder(tiny_dataset, tmp_path, left: tuple):
    for file in left:
        (tmp_path / "run" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / file).touch()

    train.check_ours(config_for(tiny_dataset, tmp_path, "run"))


def test_a_run_in_a_bucket_may_not_lie_in_the_dataset_s_folder(tiny_dataset):
    config = config_for(tiny_dataset, Path("runs"), "run")

    for data, store in (("s3://bkt/a", "s3://bkt/a/"), ("s3://bkt/a/run/b", "s3://bkt/a")):
        with pytest.raises(ValueError, match="make s3://bkt/a/run the run folder, and the dataset"):
            train.check_ours(config.model_copy(update={"data": data, "storage": store}))


def test_resume_goes_on_only_where_there_is_a_run(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(train.runtime, "connect", lambda: pytest.fail("Ray was asked"))
    config = config_for(tiny_dataset, tmp_path, "other", total_images=32, resume=True)
    fit.fit(config.model_copy(update={"name": "b16", "checkpoint_every_images": 16}),
            fit.LocalContext())  # fmt: skip

    with pytest.raises(
        FileNotFoundError, match=r"--resume, but no run .* at .*/other: .*holds b16"
    ):
        train.run(config)
    with pytest.raises(FileNotFoundError, match=r"/nowhere/other: .*/nowhere holds no runs"):
        train.run(config.model_copy(update={"storage": str(tmp_path / "nowhere")}))
    with pytest.raises(ValueError, match="--fresh starts over and --resume only goes on"):
        config_for(tiny_dataset, tmp_path, "run", resume=True, fresh=True)
    train.run(config.model_copy(update={"name": "b16"}))  # has seen all: nothing to do
    assert not (tmp_path / "nowhere").exists()


def test_contradictions_in_a_config_are_refused_with_both_values(tiny_dataset, tmp_path):
    def refused(message: str, **changes) -> None:
        with pytest.raises(ValueError, match=message):
            config_for(tiny_dataset, tmp_path, "run", **changes)

    refused("global_batch 10 is not a multiple of loader.lanes 4", global_batch=10)
    refused("loader.lanes 4 cannot be dealt evenly to 3 workers", workers=3)
    refused("micro_batch 3 does not divide 8, a worker's share of global_batch 16", micro_batch=3)
    refused(r"grid_ema 0.7 is not among optimizer.ema_decays \(0.9,\)", grid_ema=0.7)


@pytest.mark.parametrize("size", "BLHG")
@pytest.mark.parametrize(("patch", "image_size"), [(16, 256), (32, 512)])
def test_a_preset_is_the_paper_s_recipe(size: str, patch: int, image_size: int):
    config = load_preset("train", f"jit-{size.lower()}{patch}-{image_size}", TrainConfig)

    assert config.model == ModelConfig.named(f"JiT-{size}/{patch}", image_size=image_size)
    assert config.flow == FlowConfig(noise_scale=image_size / 256)
    assert config.optimizer == OptimizerConfig()
    assert (config.global_batch, config.loader.lanes) == (1024, 64)
    assert config.total_images == (320 if size == "G" else 600) * 1_281_167
    for workers in (1, 2, 4, 8, 16, 32, 64):
        micro, times = config.split(workers)
        assert micro * times * workers == 1024


def test_each_node_that_will_go_is_told_once(monkeypatch):
    """A second notice, while the first node is still there, makes a checkpoint of its own."""
    told: list[dict | None] = [None, {"a": [0]}, {"a": [0]}, {"a": [0], "b": [1]}, {"b": [1]}, None]
    notices = iter([nodes and PreemptionInfo(None, nodes) for nodes in told])
    monkeypatch.delenv(train.WATCH_PREEMPTION, raising=False)
    monkeypatch.setattr(train, "ASK_EVERY_S", 0.0)
    monkeypatch.setattr(ray.train.collective, "broadcast_from_rank_zero", lambda value: value)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: next(notices))
    monkeypatch.setattr(ray.train, "get_context", mock.Mock)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    context = train.RayContext()

    assert [context.preempted() for _ in told] == [False, True, False, True, False, False]

import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jitmodel.config import ModelConfig
from jitmodel.model import JiT
from pipelines import checkpoints, storage
from pipelines.config import TrainConfig
from pipelines.fit import LocalContext, averaged, build, fit
from pipelines.meter import NonFiniteLoss
from tests.distances import assert_trained_alike
from tests.pipelines.runs import MODEL, Killed, KilledAt, config_for, lines, run_on_ranks, tensors


def scalars(run: Path) -> dict[str, list[int]]:
    """Curves of a run in TensorBoard, and where they have points."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {name: [e.step for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


DROPPING = MODEL.model_copy(update={"dropout": 0.2, "depth": 4})


def initial(model: ModelConfig = MODEL) -> dict[str, torch.Tensor]:
    """Weights with which every run of a model in these tests begins."""
    return dict(JiT(model, generator=torch.Generator().manual_seed(0)).named_parameters())


def test_a_run_killed_three_times_ends_bit_equal_to_an_unbroken_one(tiny_dataset, tmp_path):
    whole = config_for(tiny_dataset, tmp_path, "whole", log_every_steps=3)
    broken = config_for(tiny_dataset, tmp_path, "broken", log_every_steps=3)

    fit(whole, LocalContext())
    for images in (16, 80, 48):  # after so many images, before the step is logged or saved
        with pytest.raises(Killed):
            fit(broken, KilledAt(images))
    result = fit(broken, LocalContext())

    assert result.images_seen == 160
    there, here = tensors(whole), tensors(broken)
    assert there.keys() == here.keys()
    assert any(name.startswith("ema.0.9.") for name in there)
    assert any(name.startswith("optimizer.") for name in there)
    for name in there:
        assert torch.equal(there[name], here[name]), name
    numbers = ("images_seen", "epoch", "loss", "learning_rate", "grad_norm", "loss_by_t")
    assert [{n: line[n] for n in numbers} for line in lines(broken)] == [
        {n: line[n] for n in numbers} for line in lines(whole)
    ]
    assert [line["images_seen"] for line in lines(broken)] == [48, 96, 144, 160]
    assert scalars(tmp_path / "broken")["train/loss"] == [48, 96, 144, 160]


def test_a_run_killed_before_its_first_checkpoint_says_nothing_twice(tiny_dataset, tmp_path):
    config = config_for(tiny_dataset, tmp_path, total_images=64, checkpoint_every_images=64)
    for images in (48, 32):  # after lines were written
        with pytest.raises(Killed):
            fit(config, KilledAt(images))

    fit(config, LocalContext())

    assert [line["images_seen"] for line in lines(config)] == [16, 32, 48, 64]
    assert scalars(tmp_path / "run")["train/loss"] == [16, 32, 48, 64]


def test_the_run_folder_holds_what_the_design_says(tiny_dataset, tmp_path, caplog):
    config = config_for(tiny_dataset, tmp_path, grid_every_images=96, keep_checkpoints=2)
    run = tmp_path / "run"

    with caplog.at_level(logging.INFO):
        result = fit(config, LocalContext())

    assert TrainConfig.model_validate(yaml.safe_load((run / "config.yaml").read_text())) == config
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == ["step_00000008", "step_00000010"]
    assert result.checkpoint == str(run / "checkpoints" / "step_00000010")
    assert json.loads((run / "latest.json").read_text()) == {
        "format_version": 1,
        "checkpoint": "checkpoints/step_00000010",
        "images_seen": 160,
    }
    meta = json.loads((run / "checkpoints/step_00000010/meta.json").read_text())
    assert (meta["images_seen"], meta["config"]["seed"], meta["format_version"]) == (160, 0, 1)
    assert meta["classes"][3]["name"] == "class 3"
    assert {"torch", "ray", "python"} <= meta["versions"].keys()
    grids = sorted(p.name for p in (run / "samples").iterdir())
    assert grids == ["images_0000000096.png", "images_0000000160.png"]
    with Image.open(run / "samples" / grids[1]) as grid:
        assert grid.width > 8 * 28
        assert grid.height > 10 * 28
    statuses = [r.message for r in caplog.records if "data wait" in r.message]
    assert len(statuses) == 10
    assert re.fullmatch(
        r"images 160/160  epoch 0\.76  loss \d\.\d{4}  lr 1\.00e-03  grad \d+\.\d{3}  "
        r"\d+\.\d images/s  MFU -  data wait \d+\.\d%  memory \d\.\d\d GiB  left 0 s",
        statuses[-1],
    )
    levels = lines(config)[-1]["loss_by_t"]
    assert len(levels) == 10
    assert sum(level is not None for level in levels) > 5  # 16 images in each line
    assert "train/loss_by_t/3" in scalars(run)
    assert "health/seams_real" in scalars(run)


def test_accumulation_does_not_change_the_result(tiny_dataset, tmp_path):
    at_once = config_for(tiny_dataset, tmp_path, "a", micro_batch=16, total_images=48)
    pieces = config_for(tiny_dataset, tmp_path, "b", micro_batch=2, total_images=48)

    fit(at_once, LocalContext())
    fit(pieces, LocalContext())

    assert_trained_alike(tensors(pieces), tensors(at_once), initial())


def test_thirty_steps_are_the_same_at_one_two_and_four_ranks(tiny_dataset, tmp_path, free_port):
    recording = """
import json
from pipelines import fit as module
on = module._on
def write_down(device, batch):
    print("IDS", json.dumps(dict(zip(batch.index.tolist(), batch.id.tolist()))))
    return on(device, batch)
module._on = write_down
"""
    options = {"learning_rate": 2e-4, "warmup_images": 64, "ema_decays": (0.9,)}
    found, ids = {}, {}
    for world_size in (1, 2, 4):
        config = config_for(
            tiny_dataset, tmp_path, f"of-{world_size}", total_images=480, optimizer=options,
            checkpoint_every_images=480, model=DROPPING,
        )  # fmt: skip
        outputs = run_on_ranks(free_port, config, world_size=world_size, prelude=recording)
        found[world_size] = tensors(config)
        drawn = [json.loads(text) for text in re.findall(r"IDS ({.*})", "\n".join(outputs))]
        ids[world_size] = {int(i): id for share in drawn for i, id in share.items()}
        assert sum(len(share) for share in drawn) == 480

    assert sorted(ids[1]) == list(range(480))
    assert ids[1] == ids[2] == ids[4]
    for world_size in (2, 4):
        assert_trained_alike(found[world_size], found[1], initial(DROPPING))


def test_a_finished_run_has_nothing_to_do_and_a_longer_one_goes_on(tiny_dataset, tmp_path):
    config = config_for(tiny_dataset, tmp_path, total_images=32)
    fit(config, LocalContext())

    again = fit(config, LocalContext())
    longer = fit(config.model_copy(update={"total_images": 64}), LocalContext())

    assert (again.images_seen, again.metrics) == (32, {})
    assert longer.images_seen == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": MODEL.model_copy(update={"depth": 3})}, "model.depth is 2 there and 3 here"),
        ({"seed": 5}, "seed is 0 there and 5 here"),
        ({"loader": {"lanes": 8, "window": 2}}, "loader.lanes is 4 there and 8 here"),
        ({"global_batch": 32}, "global_batch is 16 there and 32 here"),
    ],
)
def test_a_run_is_not_continued_as_another_one(tiny_dataset, tmp_path, change, message):
    fit(config_for(tiny_dataset, tmp_path, total_images=32), LocalContext())
    before = sorted(tmp_path.rglob("*"))

    with pytest.raises(ValueError, match=message) as error:
        fit(config_for(tiny_dataset, tmp_path, **change), LocalContext())

    assert "--fresh" in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_saved_nothing_yet_is_not_begun_again_as_another_one(tiny_dataset, tmp_path):
    with pytest.raises(Killed):
        fit(config_for(tiny_dataset, tmp_path), KilledAt(16))
    before = (tmp_path / "run/config.yaml").read_bytes()

    with pytest.raises(ValueError, match=r"has saved nothing yet, and seed is 0 there and 5 here"):
        fit(config_for(tiny_dataset, tmp_path, seed=5), LocalContext())

    assert (tmp_path / "run/config.yaml").read_bytes() == before
    assert fit(config_for(tiny_dataset, tmp_path), LocalContext()).images_seen == 160


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"foo: 1\n", "foo: Extra inputs are not permitted"),
        (b"seed: -1\n", "seed: Input should be greater than or equal to 0"),
        (b"", "the whole: Input should be a valid dictionary"),
        (b"- a\n", "the whole: Input should be a valid dictionary"),
        (b"a: [\n", "while parsing a flow node"),
        (b"seed: 1\0", "special characters are not allowed"),
        (b"\xff\xfe\xfa", "unacceptable character #x00fa"),
        (b"a: 2026-13-45\n", "month must be in 1..12"),
    ],
)
def test_a_config_of_a_run_that_cannot_be_read_is_named_and_kept(
    tiny_dataset, tmp_path, content: bytes, why: str
):
    file = tmp_path / "run/config.yaml"
    file.parent.mkdir()
    file.write_bytes(content)

    with pytest.raises(ValueError, match=re.escape(why)) as error:
        fit(config_for(tiny_dataset, tmp_path), LocalContext())

    assert str(error.value).startswith(f"{file} is not the config of a run that this version reads")
    assert "choose another --name, or add --fresh" in str(error.value)
    assert file.read_bytes() == content


def test_a_run_whose_checkpoints_are_gone_does_not_begin_at_image_0(tiny_dataset, tmp_path):
    config = config_for(tiny_dataset, tmp_path, total_images=32)
    fit(config, LocalContext())
    for meta in (tmp_path / "run/checkpoints").glob("*/meta.json"):
        meta.unlink()

    with pytest.raises(FileNotFoundError, match=r"names checkpoints/step_00000002 \(32 images"):
        fit(config, LocalContext())


def test_a_run_that_lost_its_checkpoints_and_all_that_names_them_is_known_by_its_metrics(
    tiny_dataset, tmp_path
):
    config = config_for(tiny_dataset, tmp_path)
    fit(config, LocalContext())
    shutil.rmtree(tmp_path / "run/checkpoints")
    (tmp_path / "run/latest.json").unlink()
    (tmp_path / "run/first.json").unlink()  # as of an earlier version, which wrote none
    with (tmp_path / "run/metrics.jsonl").open("ab") as file:
        file.write(b"\0" * 100 + b"\n")  # as a machine leaves it that lost its power
    lines = (tmp_path / "run/metrics.jsonl").read_bytes()

    with pytest.raises(FileNotFoundError, match=r"metrics.jsonl tells of 160 images, .*--fresh"):
        fit(config, LocalContext())

    assert (tmp_path / "run/metrics.jsonl").read_bytes() == lines


@pytest.mark.parametrize("left", ["first.json", "validations/step_00000001.json"])
def test_a_run_that_lost_its_checkpoints_soon_is_known_by_what_only_a_checkpoint_leaves(
    tiny_dataset, tmp_path, left: str
):
    config = config_for(tiny_dataset, tmp_path)
    with pytest.raises(Killed):
        fit(config, KilledAt(48))  # a checkpoint at image 32: metrics alone would not tell
    run = tmp_path / "run"
    assert json.loads((run / "first.json").read_text()) == {
        "format_version": 1, "checkpoint": "checkpoints/step_00000002", "images_seen": 32
    }  # fmt: skip
    shutil.rmtree(run / "checkpoints")
    for name in ("latest.json", "metrics.jsonl", "first.json"):
        (run / name).unlink()
    (run / left).parent.mkdir(exist_ok=True)
    (run / left).touch()

    found = left.partition("/")[0]
    with pytest.raises(FileNotFoundError, match=f"{found} tells that checkpoints .*--fresh"):
        fit(config, LocalContext())

    assert not (run / "metrics.jsonl").exists()


def test_lines_of_metrics_that_cannot_be_read_stop_no_run(tiny_dataset, tmp_path, caplog):
    config = config_for(tiny_dataset, tmp_path, total_images=32)
    fit(config, LocalContext())
    file = tmp_path / "run/metrics.jsonl"
    texts = ("\0" * 100, "", "\udcff", '{"loss": 1', "[1]", '{"loss": 1}', '{"images_seen": null}')
    bad = [text.encode(errors="surrogateescape") for text in texts]
    file.write_bytes(b"\n".join([*bad, *file.read_bytes().splitlines(), *bad, b'{"torn']))

    result = fit(config.model_copy(update={"total_images": 48}), LocalContext())

    assert result.images_seen == 48
    assert [line["images_seen"] for line in lines(config)] == [16, 32, 48]
    assert caplog.text.count(f"{file}: 14 damaged lines are left out") == 1


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_at_image_0(tiny_dataset, tmp_path):
    config = config_for(tiny_dataset, tmp_path, total_images=64)
    fit(config, LocalContext())
    for meta in (tmp_path / "run/checkpoints").glob("*/meta.json"):
        meta.write_bytes(meta.read_bytes()[:100])
    (tmp_path / "run/latest.json").unlink()

    with pytest.raises(ValueError, match=r"every checkpoint below .* is damaged, the newest at"):
        fit(config.model_copy(update={"seed": 1}), LocalContext())


def test_another_dataset_is_refused_by_its_fingerprint(tiny_dataset, tmp_path, monkeypatch):
    fit(config_for(tiny_dataset, tmp_path, total_images=32), LocalContext())
    other = tmp_path / "other"
    other.mkdir()
    manifest = json.loads((tiny_dataset / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": "f00"}))

    with pytest.raises(ValueError, match=r"data \(fingerprint\) is '[0-9a-f]+' there and 'f00'"):
        fit(config_for(other, tmp_path), LocalContext())


def test_a_dataset_that_does_not_fit_the_model_is_refused(tiny_dataset, tmp_path):
    wide = MODEL.model_copy(update={"image_size": 56})

    with pytest.raises(ValueError, match=r"image_size 28, but model\.image_size is 56"):
        fit(config_for(tiny_dataset, tmp_path, model=wide), LocalContext())
    with pytest.raises(FileNotFoundError, match="no manifest at"):
        fit(config_for(tmp_path / "nowhere", tmp_path), LocalContext())


def test_a_loss_that_is_no_number_stops_the_run_and_is_not_saved(tiny_dataset, tmp_path):
    config = config_for(
        tiny_dataset, tmp_path, optimizer={"learning_rate": 1e30, "warmup_images": 0,
                                           "ema_decays": (0.9,)}
    )  # fmt: skip

    with pytest.raises(NonFiniteLoss, match=r"loss (inf|nan), .* at step 2 \(places 16 ") as error:
        fit(config, LocalContext())

    assert "images with id" in str(error.value)
    assert checkpoints.newest(str(tmp_path / "run")) is None


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tiny_dataset, tmp_path, caplog):
    fit(config_for(tiny_dataset, tmp_path, total_images=64), LocalContext())
    newest = tmp_path / "run/checkpoints/step_00000004"
    shard = next(newest.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])

    found = checkpoints.newest(str(tmp_path / "run"))

    assert found is not None
    assert found.meta.images_seen == 32
    assert "step_00000004 is damaged" in caplog.text


def test_a_checkpoint_of_a_later_version_is_neither_passed_over_nor_called_damaged(
    tiny_dataset, tmp_path
):
    config = config_for(tiny_dataset, tmp_path, total_images=64)
    fit(config, LocalContext())
    newest = tmp_path / "run/checkpoints/step_00000004"
    meta = json.loads((newest / "meta.json").read_text())
    (newest / "meta.json").write_text(json.dumps(meta | {"format_version": 2, "more": []}))
    before = sorted(tmp_path.rglob("*"))

    for ask in (
        lambda: fit(config, LocalContext()),  # not from step 2, which can be read
        lambda: checkpoints.find(str(tmp_path / "run")),
        lambda: checkpoints.find(str(newest)),
    ):
        with pytest.raises(
            ValueError, match=r"_00000004 has format_version 2, and .* reads 1: upg"
        ):
            ask()

    assert sorted(tmp_path.rglob("*")) == before


def test_metadata_that_would_execute_code_is_refused(tiny_dataset, tmp_path):
    fit(config_for(tiny_dataset, tmp_path, total_images=32), LocalContext())
    uri = tmp_path / "run/checkpoints/step_00000002"
    (uri / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")

    with pytest.raises(ValueError, match=r"names (os|posix)\.system"):
        checkpoints.read(str(uri), "")


def test_the_weights_of_an_ema_are_lent_and_given_back(tiny_dataset, tmp_path):
    state = build(config_for(tiny_dataset, tmp_path), LocalContext())
    for average in state.ema.averages[0.9].values():
        average.add_(1)
    before = {n: p.clone() for n, p in state.model.named_parameters()}

    with averaged(state, 0.9):
        for name, p in state.model.named_parameters():
            assert torch.equal(p, before[name] + 1)

    for name, p in state.model.named_parameters():
        assert torch.equal(p, before[name])


@pytest.fixture
def bucket(free_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty S3 bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", free_port, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tester")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield "s3://bucket"
    server.stop()


def test_data_and_run_may_live_in_an_object_store(tiny_dataset, tmp_path, bucket):
    storage.publish_folder(tiny_dataset, f"{bucket}/data", last="manifest.json")
    whole = config_for(tiny_dataset, tmp_path, "whole")
    broken = whole.model_copy(
        update={"data": f"{bucket}/data", "storage": f"{bucket}/runs", "grid_every_images": 160}
    )

    fit(whole, LocalContext())
    with pytest.raises(Killed):
        fit(broken, KilledAt(80))
    result = fit(broken, LocalContext())

    assert result.checkpoint == f"{bucket}/runs/whole/checkpoints/step_00000010"
    there, here = tensors(whole), tensors(broken)
    assert there.keys() == here.keys()
    assert all(torch.equal(here[name], tensor) for name, tensor in there.items())
    text = storage.read_bytes(f"{bucket}/runs/whole/metrics.jsonl").decode()
    seen = [json.loads(line)["images_seen"] for line in text.splitlines()]
    assert seen == list(range(16, 161, 16))
    names = {e.relative.partition("/")[0] for e in storage.list_files(f"{bucket}/runs/whole")}
    assert names == {
        "checkpoints", "config.yaml", "first.json", "latest.json", "metrics.jsonl", "samples",
        "tensorboard",
    }  # fmt: skip
    assert storage.list_files(f"{bucket}/runs/whole/tensorboard")


def test_drawing_a_grid_changes_no_weight_of_ranks_that_keep_gathered_weights(
    tiny_dataset, tmp_path, free_port
):
    """Without resharding, no backward pass frees the EMA's weights that drawing has gathered."""
    parallel = {"precision": "fp32", "reshard_after_forward": False}
    drawn, undrawn = (
        config_for(
            tiny_dataset, tmp_path, name, grid_every_images=every,
            checkpoint_every_images=160, parallel=parallel,
        )
        for name, every in (("drawn", 48), ("undrawn", 0))
    )  # fmt: skip

    run_on_ranks(free_port, drawn, undrawn)

    expected = tensors(undrawn)
    assert [name for name, found in tensors(drawn).items() if not found.equal(expected[name])] == []
    assert len(list((tmp_path / "drawn/samples").iterdir())) == 4


def test_two_sharded_ranks_equal_one_process_and_checkpoints_go_both_ways(
    tiny_dataset, tmp_path, free_port
):
    def config(name: str, images: int, **changes) -> TrainConfig:
        return config_for(tiny_dataset, tmp_path, name, total_images=images, **changes)

    one = config("one", 160, grid_every_images=160)
    two = config("two", 160, grid_every_images=160)
    wild = {"learning_rate": 1e30, "warmup_images": 0, "ema_decays": (0.9,)}
    fit(one, LocalContext())
    fit(config("1to2", 80), LocalContext())
    outputs = run_on_ranks(
        free_port, two, config("2to1", 80), config("1to2", 160), config("wild", 160, optimizer=wild)
    )
    fit(config("2to1", 160), LocalContext())

    expected = tensors(one)
    assert any(name.startswith("ema.0.9.") for name in expected)
    for name in ("two", "2to1", "1to2"):
        found = tensors(config(name, 160))
        assert_trained_alike(found, expected, initial())
    losses = [line["loss"] for line in lines(one)]
    assert [line["loss"] for line in lines(two)] == pytest.approx(losses, rel=1e-5)
    with (
        Image.open(tmp_path / "one/samples/images_0000000160.png") as a,
        Image.open(tmp_path / "two/samples/images_0000000160.png") as b,
    ):
        off = torch.frombuffer(bytearray(a.tobytes()), dtype=torch.uint8).int()
        off = (off - torch.frombuffer(bytearray(b.tobytes()), dtype=torch.uint8).int()).abs()
        assert off.max() <= 1
    stopped = [out[out.index("STOPPED") :].splitlines()[0] for out in outputs]
    assert stopped[0] == stopped[1]
    assert "at step 2" in stopped[0]

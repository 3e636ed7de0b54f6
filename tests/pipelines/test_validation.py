"""Checkpoints judged while training goes on: best ones kept, early stop, the same for all ranks."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from jitmodel.config import SamplerConfig
from pipelines import checkpoints, storage, train, validation
from pipelines.config import TrainConfig, ValidationConfig
from pipelines.features import get_extractor
from pipelines.fit import LocalContext, fit, kept_steps
from pipelines.reference import DatasetImages, ReferenceIdentity, extract, write_reference
from pipelines.shards import read_manifest
from pipelines.validation import Score, best, identity, scores, validate, verdict
from tests.pipelines.runs import config_for, run_on_ranks
from tests.processes import descendants

JUDGED = {"reference": "a-file", "ema": 0.9, "patience": 2, "keep_best": 1}
SAMPLER = SamplerConfig(steps=2)
"""That of config_for."""
FALLS_AND_RISES = {2: 5.0, 4: 3.0, 6: 4.0, 8: 3.5, 10: 2.0}
"""Distances by step. That of step 8 ends a run of patience 2 before step 10 is stored."""


def write_score(
    run: str, config: ValidationConfig, step: int, value: float, sampler: SamplerConfig = SAMPLER
) -> None:
    score = Score(
        step=step, images_seen=16 * step, metric="FD-x-10", value=value,
        identity=identity(config, sampler),
    )  # fmt: skip
    uri = storage.join(run, validation.FOLDER, f"step_{step:08d}.json")
    storage.write_json(uri, score.model_dump(mode="json"))


class Judge(LocalContext):
    """Somebody who judges each checkpoint the moment it is stored."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.config, self.told = config.validation, list[str]()

    def report(self, metrics: dict, checkpoint: str) -> None:
        self.told.append(checkpoint)
        run, _, name = checkpoint.rpartition("/checkpoints/")
        step = int(name.removeprefix("step_"))
        write_score(run, self.config, step, FALLS_AND_RISES[step])


def steps(config: TrainConfig) -> list[int]:
    return list(checkpoints.complete(storage.join(config.storage, config.name)))


def test_training_stops_when_the_distance_rises_and_the_best_checkpoint_stays(
    tiny_dataset, tmp_path
):
    config = config_for(
        tiny_dataset, tmp_path, validation=JUDGED, keep_checkpoints=1, total_images=320
    )

    result = fit(config, Judge(config))

    assert "FD-x-10 was 3 at image 64 and 4, 3.5 since: 2 validations" in result.stopped
    assert 128 <= result.images_seen <= 160
    assert steps(config) == [4, 8]
    # The same line again has nothing to do; with more patience it goes on, to a better one.
    assert fit(config, Judge(config)).stopped == result.stopped
    patient = config.model_copy(
        update={
            "validation": config.validation.model_copy(update={"patience": 3}),
            "total_images": 160,
        }
    )
    assert fit(patient, Judge(patient)).images_seen == 160
    assert steps(patient) == [4, 10]  # the newest one is judged after it is stored


class SlowJudge(LocalContext):
    """Judges one checkpoint at a time, as Ray does, each for as long as three more take."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.config, self.waiting, self.left = config, list[str](), 0
        self.mark = Path(config.storage, config.name, validation.FOLDER, validation.JUDGED_NOW)

    def report(self, metrics: dict, checkpoint: str) -> None:
        self.waiting.append(checkpoint)
        if self.left:
            self.left -= 1
            if not self.left:
                run, _, name = self.waiting[0].rpartition("/checkpoints/")
                step = int(name.removeprefix("step_"))
                assert storage.exists(self.waiting.pop(0)), "deleted while it was judged"
                write_score(run, self.config.validation, step, abs(step - 11) + 1.0)
                self.mark.unlink()
        if not self.left:
            while not storage.exists(self.waiting[0]):
                self.waiting.pop(0)
            self.left = 3
            self.mark.parent.mkdir(exist_ok=True)
            self.mark.write_text(json.dumps({"step": int(self.waiting[0][-8:])}))


def test_a_judge_slower_than_checkpoints_finds_what_it_judges_and_the_best_one_stays(
    tiny_dataset, tmp_path
):
    config = config_for(
        tiny_dataset, tmp_path, validation=JUDGED, keep_checkpoints=2, total_images=640,
        checkpoint_every_images=16,
    )  # fmt: skip

    assert "FD-x-10 was" in fit(config, SlowJudge(config)).stopped

    found = validation.scores(str(tmp_path / "run"), config.validation, config.sampler)
    (least,) = best(found, 1)
    assert len(found) > 3
    assert least.step in steps(config)
    assert f"step_{least.step:08d}" in train.best_of(config)


def test_scores_of_checkpoints_that_are_gone_hold_no_place_among_the_best(tiny_dataset, tmp_path):
    config = config_for(tiny_dataset, tmp_path, validation=JUDGED, keep_checkpoints=1)
    for step, value in ((1, 1.0), (5, 2.0)):
        write_score(str(tmp_path / "run"), config.validation, step, value)

    assert kept_steps(config, [5, 6, 7]) == {5, 7}


def test_all_ranks_stop_at_the_same_step_although_one_reads_the_scores(
    tiny_dataset, tmp_path, free_port
):
    config = config_for(tiny_dataset, tmp_path, validation=JUDGED, total_images=320)
    judge = f"""
from pipelines import storage
from pipelines.validation import Score, identity
def report(self, metrics, checkpoint):
    if rank == 0:
        step = int(checkpoint[-8:])
        score = Score(step=step, images_seen=16 * step, metric="FD", value={FALLS_AND_RISES}[step],
                      identity=identity(config.validation, config.sampler))
        uri = checkpoint.replace("checkpoints", "validations") + ".json"
        storage.write_json(uri, score.model_dump(mode="json"))
LocalContext.report = report
from pipelines import fit as module
scores = module.validation.scores
module.validation.scores = lambda *a: scores(*a) if rank == 0 else []
plain = fit
def fit(config, context):
    print("ENDED", plain(config, context).images_seen)
"""
    outputs = run_on_ranks(free_port, config, prelude=judge)

    ends = {out[out.index("ENDED") :].split()[1] for out in outputs}
    assert len(ends) == 1
    assert 128 <= int(ends.pop()) <= 160


def test_a_checkpoint_without_a_score_is_reported_again_after_a_restart(tiny_dataset, tmp_path):
    config = config_for(tiny_dataset, tmp_path, validation=JUDGED, total_images=64)
    fit(config, Judge(config))
    for step in (2, 4):
        (tmp_path / f"run/validations/step_{step:08d}.json").unlink()

    judge = Judge(config)
    fit(config, judge)

    folder = tmp_path / "run/checkpoints"  # the newest first: it is what may stop the run
    assert judge.told == [str(folder / "step_00000004"), str(folder / "step_00000002")]


def test_the_best_checkpoint_of_a_run_that_stopped_is_named_with_its_export(tiny_dataset, tmp_path):
    config = config_for(tiny_dataset, tmp_path, validation=JUDGED, total_images=64)
    fit(config, Judge(config))
    found = validation.scores(str(tmp_path / "run"), config.validation, config.sampler)
    least = min(found, key=lambda score: score.value)

    said = train.best_of(config)

    assert f"jit export {tmp_path}/run/checkpoints/step_{least.step:08d} --ema 0.9 " in said


def test_scores_of_another_validation_do_not_count(tmp_path):
    config = ValidationConfig.model_validate(JUDGED)
    write_score(str(tmp_path), config, 2, 1.0)
    write_score(str(tmp_path), config.model_copy(update={"num_images": 10}), 4, 0.1)
    write_score(str(tmp_path), config, 6, 0.1, SamplerConfig(steps=2, cfg_scale=4.0))
    (tmp_path / "validations/notes.txt").write_text("hello")

    assert [score.step for score in scores(str(tmp_path), config, SAMPLER)] == [2]
    more = config.model_copy(update={"patience": 9, "keep_best": 3})  # no other question
    assert [score.step for score in scores(str(tmp_path), more, SAMPLER)] == [2]


@pytest.mark.parametrize("content", ["{", "[]", '{"step": 4}', "\xff"])
def test_a_damaged_score_is_ignored_with_a_warning(tmp_path, caplog, content):
    config = ValidationConfig.model_validate(JUDGED)
    write_score(str(tmp_path), config, 2, 1.0)
    damaged = tmp_path / "validations/step_00000004.json"
    damaged.write_text(content, "latin-1")

    assert [score.step for score in scores(str(tmp_path), config, SAMPLER)] == [2]

    assert f"the score {damaged} is damaged, and ignored" in caplog.text


def test_the_verdict_counts_from_the_best_score_and_an_equal_one_is_not_better():
    def found(*values: float) -> list[Score]:
        return [
            Score(step=n, images_seen=n, metric="FID-5000", value=value, identity={})
            for n, value in enumerate(values, 1)
        ]

    assert verdict([], 2) == ""
    assert verdict(found(3, 4, 5), 0) == ""
    assert verdict(found(5, 4, 3), 1) == ""
    assert verdict(found(3, 4), 2) == ""
    assert verdict(found(3, 4, 3), 2).startswith("FID-5000 was 3 at image 1 and 4, 3 since")
    assert [score.step for score in best(found(3, 4, 3, 2), 3)] == [4, 1, 3]


@pytest.fixture(scope="module")
def reference(tiny_dataset, tmp_path_factory) -> str:
    """Statistics of the first 80 images of the tiny dataset."""
    images = DatasetImages(str(tiny_dataset), read_manifest(str(tiny_dataset)), 80)
    extractor = get_extractor(ValidationConfig().extractor)
    identity = ReferenceIdentity(
        extractor=extractor.identity.as_dict(), image_size=28, classes=images.classes,
        num_images=80, dataset_fingerprint=images.fingerprint, versions={},
    )  # fmt: skip
    pieces = [extract(images, piece, extractor, torch.device("cpu")) for piece in images.pieces]
    uri = str(tmp_path_factory.mktemp("reference") / "reference.npz")
    write_reference(uri, identity, iter(pieces))
    return uri


def test_a_validation_is_checked_before_training_starts(tiny_dataset, tmp_path, reference):
    def refused(message: str, **changes) -> None:
        options = {"reference": reference, "ema": 0.9, "num_images": 20} | changes
        config = config_for(tiny_dataset, tmp_path, validation=options)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train.run(config)

    refused("no reference at .*nowhere", reference=str(tmp_path / "nowhere.npz"))
    refused(
        "--validation.num-images: 15 images cannot be spread evenly over 10 classes", num_images=15
    )
    with pytest.raises(ValueError, match=r"validation.ema 0.5\d is not among optimizer.ema_decays"):
        config_for(tiny_dataset, tmp_path, validation={"reference": reference, "ema": 0.55})
    assert not (tmp_path / "run").exists()


@pytest.mark.ray
def test_ray_judges_checkpoints_on_a_worker_of_their_own_while_training_goes_on(
    ray_cluster, tiny_dataset, tmp_path, reference
):
    options = {"reference": reference, "ema": 0.9, "num_images": 20, "batch": 10}
    config = config_for(
        tiny_dataset, tmp_path, validation=options, workers="2", keep_checkpoints=3,
        checkpoint_every_images=64,
    )  # fmt: skip

    train.run(config)

    run = str(tmp_path / "run")
    found = scores(run, config.validation, config.sampler)
    assert [score.step for score in found] == [4, 8, 10]
    assert {score.metric for score in found} == {"FD-efflite0-20"}
    assert not (tmp_path / "run/ray").exists()
    # The score is a function of the checkpoint: whoever computes it gets the same.
    uri = storage.join(run, "checkpoints", "step_00000010")
    Path(run, "validations/step_00000010.json").unlink()
    again = validate(uri, config.validation, torch.device("cpu"))
    assert again.value == pytest.approx(found[-1].value, rel=1e-4)
    assert not Path(run, "validations", validation.JUDGED_NOW).exists()
    assert json.loads(Path(run, "validations/step_00000010.json").read_text())["step"] == 10


def test_a_judge_passes_over_a_checkpoint_that_is_gone_but_not_a_reference_that_is(
    tiny_dataset, tmp_path
):
    config = config_for(tiny_dataset, tmp_path, total_images=32)
    uri = fit(config, LocalContext()).checkpoint
    options = {"reference": str(tmp_path / "nowhere.npz"), "ema": 0.9, "num_images": 10}

    with pytest.raises(FileNotFoundError, match="no reference at"):
        train.judge(None, uri, options)
    assert train.judge(None, uri.replace("00000002", "00000001"), options) == {}


def test_a_judge_that_is_killed_costs_a_score_and_not_the_training(tiny_dataset, tmp_path, caplog):
    config = config_for(tiny_dataset, tmp_path, total_images=32)
    uri = fit(config, LocalContext()).checkpoint
    options = {"reference": str(tmp_path / "nowhere.npz"), "ema": 0.9, "num_images": 10}

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(train.judge, None, uri, options)
        while not (found := descendants(os.getpid(), "spawn_main")):
            assert not answer.done(), answer.result()
            time.sleep(0.01)
        for process in found:
            os.kill(process, signal.SIGKILL)

    assert answer.result() == {}
    assert "is not judged, training goes on: its process ended with -9" in caplog.text

"""A loss that is no number: every rank stops with one message, or all go back and leave it out."""

import re
import weakref
from pathlib import Path

import pytest
import torch

from jitmodel.state import TrainState
from pipelines import checkpoints
from pipelines import fit as training
from pipelines.fit import LocalContext, fit
from pipelines.loader import Loader
from pipelines.meter import NonFiniteLoss
from pipelines.shards import read_manifest
from tests.pipelines.runs import (
    Killed,
    KilledAt,
    config_for,
    lines,
    run_on_ranks,
    stopped,
    tensors,
)

PLACE = 38
"""In step 3, of a lane that rank 1 of two owns."""
POISON = f"""
from jitmodel.state import TrainState
losses = TrainState.losses
def poisoned(self, batch):
    loss, t = losses(self, batch)
    if {PLACE} in batch.index:
        print("BAD", time.time())
    return torch.where(batch.index == {PLACE}, torch.nan, loss), t
if rank == 1:
    TrainState.losses = poisoned
"""


@pytest.fixture
def poison(monkeypatch):
    """Makes the losses of the images at some places no numbers."""

    def poison(*places: int) -> None:
        losses, bad = TrainState.losses, torch.tensor(places)

        def poisoned(self, batch):
            loss, t = losses(self, batch)
            return torch.where(torch.isin(batch.index, bad), torch.nan, loss), t

        monkeypatch.setattr(TrainState, "losses", poisoned)

    return poison


def id_at(data: Path, place: int) -> int:
    loader = Loader(
        str(data), read_manifest(str(data)), config_for(data, data).loader, seed=0, global_batch=16
    )
    stream = loader.batches(place // 16 * 16)
    batch = next(stream)
    stream.close()
    return int(batch.id[place % 16])


def test_a_loss_that_is_no_number_on_one_rank_stops_all_with_one_message_or_is_left_out(
    tiny_dataset, tmp_path, free_port
):
    stops = config_for(tiny_dataset, tmp_path, "stops")
    skips = config_for(tiny_dataset, tmp_path, "skips", non_finite="skip")

    outputs = run_on_ranks(free_port, stops, skips, prelude=POISON)

    (sentence,) = stopped(outputs)
    assert "loss nan" in sentence
    bad = float(re.findall("BAD (.+)", outputs[1])[0])
    assert all(0 < float(re.findall("AT (.+)", out)[0]) - bad < 30 for out in outputs)
    assert "at step 3 (places 32 .. 47 of the run)" in sentence
    assert f"not finite for images with id {id_at(tiny_dataset, PLACE)}." in sentence
    found = checkpoints.newest(str(tmp_path / "stops"))
    assert found is not None
    assert found.meta.images_seen == 32
    found = checkpoints.newest(str(tmp_path / "skips"))
    assert found is not None
    assert (found.meta.images_seen, found.meta.skipped) == (160, (32,))
    assert all(tensor.isfinite().all() for tensor in tensors(skips).values())


def test_a_batch_left_out_stays_left_out_when_the_run_is_killed_and_resumed(
    tiny_dataset, tmp_path, poison, caplog
):
    poison(PLACE)
    whole = config_for(tiny_dataset, tmp_path, "whole", non_finite="skip")
    broken = config_for(tiny_dataset, tmp_path, "broken", non_finite="skip")

    fit(whole, LocalContext())
    for images in (64, 32):
        with pytest.raises(Killed):
            fit(broken, KilledAt(images))
    fit(broken, LocalContext())

    assert "leaving this batch out" in caplog.text
    assert [line["images_seen"] for line in lines(whole)] == [16, 32, *range(64, 161, 16)]
    there, here = tensors(whole), tensors(broken)
    assert all(torch.equal(here[name], tensor) for name, tensor in there.items())


def test_too_many_batches_without_a_number_stop_the_run_although_they_may_be_left_out(
    tiny_dataset, tmp_path
):
    wild = {"learning_rate": 1e30, "warmup_images": 0, "ema_decays": (0.9,)}
    config = config_for(tiny_dataset, tmp_path, optimizer=wild, non_finite="skip", max_skips=2)

    with pytest.raises(NonFiniteLoss, match="at step 4 "):
        fit(config, LocalContext())


def test_going_back_frees_the_old_state_before_a_second_one_is_built(
    tiny_dataset, tmp_path, poison, monkeypatch
):
    poison(PLACE)
    build, built, times = training.build, list[weakref.ref](), 0

    def watched(*args):
        nonlocal times
        times += 1
        assert [ref() for ref in built] == [None] * len(built)
        state = build(*args)
        built.extend(weakref.ref(parameter) for parameter in state.model.parameters())
        built.append(weakref.ref(state))
        return state

    monkeypatch.setattr(training, "build", watched)
    config = config_for(tiny_dataset, tmp_path, non_finite="skip")
    fit(config, LocalContext())

    assert times == 2


def test_a_line_waits_for_a_step_when_a_batch_is_left_out_right_after_a_checkpoint(
    tiny_dataset, tmp_path, poison
):
    """A checkpoint at image 32, a line due at image 48, and the batch between is left out."""
    poison(PLACE)
    config = config_for(tiny_dataset, tmp_path, non_finite="skip", log_every_steps=3)

    fit(config, LocalContext())

    assert [line["images_seen"] for line in lines(config)] == [96, 144, 160]


def test_each_start_of_a_run_may_leave_out_max_skips_batches(tiny_dataset, tmp_path, poison):
    poison(PLACE, 100)  # in steps 3 and 7
    config = config_for(tiny_dataset, tmp_path, non_finite="skip", max_skips=1)

    with pytest.raises(NonFiniteLoss, match="at step 7 "):
        fit(config, LocalContext())
    fit(config, LocalContext())

    found = checkpoints.newest(str(tmp_path / "run"))
    assert found is not None
    assert (found.meta.images_seen, found.meta.skipped) == (160, (32, 96))


def test_a_save_that_is_due_before_the_first_step_changes_nothing(tiny_dataset, tmp_path, poison):
    """Asked for its state before a step, an optimizer counts one."""
    poison(3)  # the first batch is left out
    often, once = (
        config_for(
            tiny_dataset, tmp_path, f"every-{every}", non_finite="skip",
            checkpoint_every_images=every,
        )
        for every in (16, 160)
    )  # fmt: skip

    for config in (often, once):
        fit(config, LocalContext())

    there, here = tensors(once), tensors(often)
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], tensor) for name, tensor in there.items())

"""Checkpoints that are stored while training goes on, and every way in which that can go wrong."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import checkpoints, lease, storage
from pipelines.checkpoints import SaveFailed
from pipelines.fit import LocalContext, fit, kept_steps
from tests.pipelines.runs import config_for, lines, run_on_ranks, start_ranks, stopped, tensors


def newest(run: Path | str) -> int:
    found = checkpoints.newest(str(run))
    assert found is not None
    checkpoints.read(found.uri, "")  # whole in content, not in name only
    return found.meta.images_seen


KILLED = """
import json, os, signal, sys
from pathlib import Path
from pipelines import checkpoints, lease, storage
from pipelines.config import TrainConfig
from pipelines.fit import LocalContext, fit
import torch

torch.set_num_threads(1)
base, scratch = map(Path, sys.argv[1:3])
config = TrainConfig.model_validate_json(sys.argv[3])
staged, delete, copy = storage.staged, storage.delete, checkpoints._copy_state_dict

def dies(point):
    "A process that runs into SIGKILL at a point of the save after image 64."
    done = [0]
    def here(name):
        if name == point:
            os.kill(os.getpid(), signal.SIGKILL)
    def counted(uri):
        if "/checkpoints/step_00000004" in uri or "latest" in uri or "first.json" in uri:
            here(("before", uri.rpartition("/")[2]))
            class Partly:
                def __enter__(self):
                    self.inner = staged(uri); return self.inner.__enter__()
                def __exit__(self, *error):
                    here(("within", uri.rpartition("/")[2]))
                    result = self.inner.__exit__(*error)
                    here(("after", uri.rpartition("/")[2]))
                    return result
            return Partly()
        return staged(uri)
    def deleted(uri):
        if "step_00000001" in uri:
            here(("deleting", uri.rpartition("/")[2]))
        delete(uri)
        if uri.endswith("step_00000001/meta.json"):
            here(("deleted", "meta.json"))
    def copied(live, copy_):
        if done[0]:  # the first one only takes the memory
            here(("copying", ""))
        done[0] += 1
        return copy(live, copy_)
    storage.staged, storage.delete, checkpoints._copy_state_dict = counted, deleted, copied
    fit(config.model_copy(update={"storage": str(scratch / "-".join(point))}), LocalContext())

for text in sys.argv[4:]:
    point = tuple(json.loads(text))
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            dies(point)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (point, status)
"""

POINTS = {
    ("copying", ""): 32,
    ("before", "__0_0.distcp"): 32,
    ("within", "__0_0.distcp"): 32,
    ("after", "__0_0.distcp"): 32,
    ("after", ".metadata"): 32,
    ("within", "meta.json"): 32,
    ("after", "meta.json"): 64,
    ("within", "latest.json"): 64,
    ("within", "first.json"): 64,
    ("deleting", "meta.json"): 64,
    ("deleted", "meta.json"): 64,
    ("deleting", "step_00000001"): 64,
}
"""Where the process dies while the checkpoint at image 64 is saved -> what is found then."""


def test_a_sigkill_at_any_point_of_a_save_leaves_the_newest_complete_checkpoint(
    tiny_dataset, tmp_path
):
    base = tmp_path / "base"
    short = config_for(tiny_dataset, base, total_images=32, checkpoint_every_images=16)
    fit(short, LocalContext())  # checkpoints at images 16 and 32: steps 1 and 2
    (base / "run/first.json").unlink()  # so that the save writes it, too
    scratch = tmp_path / "killed"
    for point in POINTS:
        shutil.copytree(base, scratch / "-".join(point))
    longer = short.model_copy(
        update={"total_images": 64, "keep_checkpoints": 2, "checkpoint_every_images": 64}
    )

    points = [json.dumps(point) for point in POINTS]
    subprocess.run(
        [sys.executable, "-c", KILLED, str(base), str(scratch), longer.model_dump_json(), *points],
        check=True,
        timeout=300,
    )

    found = {point: newest(scratch / "-".join(point) / "run") for point in POINTS}
    assert found == POINTS
    # And what a kill left behind hinders nobody.
    for point in (("within", "__0_0.distcp"), ("within", "meta.json"), ("deleted", "meta.json")):
        config = longer.model_copy(update={"storage": str(scratch / "-".join(point))})
        result = fit(config.model_copy(update={"total_images": 80}), LocalContext())
        assert result.images_seen == 80
        folders = sorted(p.name for p in Path(config.storage, "run/checkpoints").iterdir())
        assert len(folders) == 2, folders
        assert folders[-1] == "step_00000005"
        assert not list(Path(config.storage).rglob(".tmp-*/*"))


def test_a_sigkill_of_a_rank_when_some_shards_are_stored_leaves_the_checkpoint_before(
    tiny_dataset, tmp_path, free_port
):
    """Rank 1 dies when the shard of rank 0 is there, and its own is not."""
    config = config_for(tiny_dataset, tmp_path)
    half = tmp_path / "run/checkpoints/step_00000004"
    dies = f"""
import signal
from pathlib import Path
from pipelines import storage
move_in = storage.move_in
def dying(path, uri):
    if rank == 1 and "step_00000004" in uri:
        while not Path("{half}/__0_0.distcp").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    move_in(path, uri)
storage.move_in = dying
"""
    ranks = start_ranks(free_port, config, prelude=dies)
    for process in ranks:
        process.communicate(timeout=120)

    assert ranks[1].returncode == -signal.SIGKILL
    assert [path.name for path in half.glob("*.distcp")] == ["__0_0.distcp"]
    assert newest(tmp_path / "run") == 32


class Releasing(LocalContext):
    """Lets the store answer in the third step, and looks what is there before."""

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.run, self.steps, self.go = run, 0, threading.Event()

    def preempted(self) -> bool:
        self.steps += 1
        if self.steps == 3:
            assert checkpoints.newest(str(self.run)) is None
            self.go.set()
        return False


def test_training_goes_on_while_a_checkpoint_is_stored_and_the_copy_stays_as_it_was(
    tiny_dataset, tmp_path, monkeypatch
):
    """The store takes the checkpoint of step 2 only after step 3: who waited would hang."""
    slow = config_for(tiny_dataset, tmp_path / "slow", total_images=64, keep_checkpoints=9)
    quick = config_for(tiny_dataset, tmp_path / "quick", total_images=32)
    context, staged = Releasing(tmp_path / "slow/run"), storage.staged

    def waiting(uri: str):
        if "slow/run/checkpoints/step_00000002" in uri:
            assert context.go.wait(120)
        return staged(uri)

    monkeypatch.setattr(storage, "staged", waiting)
    fit(slow, context)
    fit(quick, LocalContext())

    here = checkpoints.read(str(tmp_path / "slow/run/checkpoints/step_00000002"), "")
    there = tensors(quick)
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], tensor) for name, tensor in there.items())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MB: a checkpoint of these runs has 2."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], check=False)
    if made.returncode:
        pytest.skip("needs the right to mount a small disk (root, or a container that may mount)")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_stops_training_with_one_sentence_and_the_last_checkpoint_stays(
    tiny_dataset, tmp_path, small_disk
):
    config = config_for(tiny_dataset, small_disk, log_every_steps=100)

    with pytest.raises(SaveFailed, match=r"at image 64 could not be .* No space left on") as error:
        fit(config, LocalContext())

    assert len(str(error.value).splitlines()) == 1
    assert newest(small_disk / "run") == 32
    # Room is made, and the same line goes on.
    moved = tmp_path / "more-room"
    shutil.copytree(small_disk, moved)
    assert fit(config.model_copy(update={"storage": str(moved)}), LocalContext()).images_seen == 160


@pytest.mark.parametrize("every", [480, 160, 80])  # fails at the only one, or at the first of many
def test_a_run_whose_first_checkpoint_could_not_be_stored_begins_again_by_the_same_line(
    tiny_dataset, tmp_path, small_disk, every: int
):
    config = config_for(tiny_dataset, small_disk, total_images=160, checkpoint_every_images=every)
    filler = small_disk / "other"
    filler.write_bytes(bytes(2 * 2**20))
    with pytest.raises(SaveFailed, match="the same line again goes on"):
        fit(config, LocalContext())
    assert checkpoints.newest(str(small_disk / "run")) is None

    filler.unlink()

    if every == 80:  # there is no room for two
        config = config.model_copy(update={"checkpoint_every_images": 160})
    assert fit(config, LocalContext()).images_seen == 160


class Filling(LocalContext):
    """Fills a disk in the third step."""

    def __init__(self, disk: Path) -> None:
        super().__init__()
        self.disk, self.steps = disk, 0

    def preempted(self) -> bool:
        self.steps += 1
        if self.steps == 3:
            with suppress(OSError), (self.disk / "other").open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        return False


# TensorBoard's thread ends by it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_metrics_that_find_the_disk_full_are_left_out_and_a_save_still_says_why_it_stops(
    tiny_dataset, small_disk, caplog
):
    config = config_for(
        tiny_dataset, small_disk, total_images=480, checkpoint_every_images=480,
        grid_every_images=160,
    )  # fmt: skip

    with pytest.raises(SaveFailed, match=r"at image 480 could not be .* No space left on"):
        fit(config, Filling(small_disk))

    # Of 30 lines, those for which the file's last page had room are there, and whole.
    assert 2 < len(lines(config)) < 30
    assert caplog.text.count("metrics could not be stored, training goes on") == 1


def test_a_rank_that_cannot_write_stops_every_rank_with_the_same_sentence(
    tiny_dataset, tmp_path, free_port
):
    """Rank 1 may write no file of more than 100 kB; its shard has ten times as much."""
    limit = """
import resource, signal
if rank == 1:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
"""
    outputs = run_on_ranks(free_port, config_for(tiny_dataset, tmp_path), prelude=limit)

    (sentence,) = stopped(outputs)
    assert "the checkpoint at image 32 could not be stored" in sentence
    assert "is the disk full that holds" in sentence
    assert checkpoints.newest(str(tmp_path / "run")) is None


class Replaced(LocalContext):
    """A worker that outlived its command; after its first save the next command is at work."""

    def __init__(self, folder: Path, theirs: Path) -> None:
        super().__init__()
        self.folder, self.theirs, self.steps = str(folder), theirs, 0

    def preempted(self) -> bool:
        self.steps += 1
        if self.steps == 3:
            while checkpoints.newest(str(self.theirs.parents[2])) is None:
                time.sleep(0.05)
            with lease.claim(self.folder):
                self.theirs.parent.mkdir(parents=True)
                self.theirs.write_text("stored by the next command")
        return False

    def check_alone(self) -> None:
        lease.check_newest(self.folder, 1)


def test_a_worker_that_outlived_its_command_touches_no_checkpoint_of_the_next(
    tiny_dataset, tmp_path
):
    config = config_for(tiny_dataset, tmp_path)
    theirs = tmp_path / "run" / "checkpoints" / "step_00000004" / "__0_0.distcp"
    with lease.claim(str(tmp_path / "writer")):
        pass

    with pytest.raises(SaveFailed, match=r"image 64 could not be .* replaced by `.*process"):
        fit(config, Replaced(tmp_path / "writer", theirs))

    assert theirs.read_text() == "stored by the next command"
    assert newest(tmp_path / "run") == 32


class Outage(LocalContext):
    """The store refuses every request from the fifth step on, and the save of step 4 is over."""

    def __init__(self, store: Any, run: str) -> None:
        super().__init__()
        self.store, self.run, self.steps = store, run, 0

    def preempted(self) -> bool:
        self.steps += 1
        if self.steps == 5:
            while newest(self.run) < 64:
                time.sleep(0.1)
            self.store.slow_down = 1.0
        return False


@pytest.mark.slow
def test_a_store_that_answers_503_is_asked_again_and_one_that_stays_so_stops_training(
    tiny_dataset, tmp_path, faulty_store, faulty_environment, monkeypatch
):
    for name, value in faulty_environment.items():
        monkeypatch.setenv(name, value)
    whole = config_for(tiny_dataset, tmp_path, "faulty", total_images=112, log_every_steps=4)
    config = whole.model_copy(update={"storage": "s3://bucket/saving"})
    fit(whole, LocalContext())

    # 28 % of the requests fail, and from step 5 on all do: the saves of steps 2 and 4 get through.
    monkeypatch.setattr(storage, "DEADLINE_S", 3.0)
    with pytest.raises(SaveFailed, match=r"at image 96 could not be stored .*SlowDown"):
        fit(config, Outage(faulty_store, "s3://bucket/saving/faulty"))
    faulty_store.slow_down = 0.2
    monkeypatch.setattr(storage, "DEADLINE_S", 60.0)
    assert newest("s3://bucket/saving/faulty") == 64
    fit(config, LocalContext())

    assert faulty_store.seen["slow_down"] > 10
    there, here = tensors(whole), tensors(config)
    assert all(torch.equal(here[name], tensor) for name, tensor in there.items())


def test_the_newest_checkpoints_and_every_nth_stay(tiny_dataset, tmp_path):
    config = config_for(
        tiny_dataset, tmp_path, checkpoint_every_images=16, keep_checkpoints=2, keep_every=4
    )

    fit(config, LocalContext())

    names = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert names == [f"step_{n:08d}" for n in (4, 8, 9, 10)]
    # A checkpoint that the schedule did not ask for (a machine was about to go) is no n-th one.
    uneven = config.model_copy(update={"checkpoint_every_images": 24, "keep_every": 2})
    assert kept_steps(uneven, [2, 3, 4, 5, 6, 7, 8, 9]) == {3, 6, 8, 9}

"""A run on a cluster whose nodes come and go: a real Ray cluster of several nodes, one machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import ray
import ray.train

from pipelines import checkpoints
from pipelines.loader import Loader
from pipelines.shards import read_manifest
from pipelines.train import WholeLanes
from tests.pipelines.runs import config_for

STORY = """
import json, os, subprocess, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from pipelines import fit, train
from pipelines.config import TrainConfig

def slow_worker(options):
    "A worker that takes its time for a step, and writes down what it trains on."
    on, passed = fit._on, []
    def write_down(device, batch):
        rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
        with Path(options["storage"], f"ids-{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps([int(world), batch.index.tolist(), batch.id.tolist()]) + "\\n")
        time.sleep(0.15)
        return on(device, batch)
    fit._on = write_down
    return train.worker(options)

def seen():
    try:
        lines = Path(config.storage, config.name, "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["images_seen"]
    except (OSError, IndexError):
        return 0

def latest_world():
    files = sorted(Path(config.storage).glob("ids-*.jsonl"), key=lambda f: f.stat().st_mtime)
    lines = [l for l in files[-1].read_text().splitlines() if l.endswith("]]")] if files else []
    return json.loads(lines[-1])[0] if lines else 0

def until(what, condition, timeout=150):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout, f"waited in vain until {what}"
        assert training.is_alive(), f"training ended before {what}: {outcome}"
        time.sleep(0.2)
    print("STORY", what, seen(), flush=True)

config = TrainConfig.model_validate_json(sys.argv[1])
events = sys.argv[2:]
address, cluster = os.environ.get("STORY_ADDRESS"), None
if not address:
    head = {"num_cpus": 0, "include_dashboard": True}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=2), cluster.add_node(num_cpus=2)]
    address = cluster.address
ray.init(address=address, logging_level="WARNING")
outcome = []
def run():
    try:
        outcome.append(train.launch(config, use_gpu=False, worker=slow_worker))
    except BaseException as error:
        outcome.append(repr(error))
training = threading.Thread(target=run, daemon=True)
training.start()
until("training has begun", lambda: seen() >= 64)
for event in events:
    event, *numbers = event.split(":")
    if event == "lose":  # the newest node; so many workers are left
        cluster.remove_node(nodes.pop(), allow_graceful=False)
        world, before = int(numbers[0]), seen()
        until(f"it is down to {world}", lambda: latest_world() == world and seen() > before + 32)
    elif event == "gain":  # a node of so many CPUs; to so many workers
        nodes.append(cluster.add_node(num_cpus=int(numbers[0])))
        world, before = int(numbers[1]), seen()
        until(f"it is up to {world}", lambda: latest_world() == world and seen() > before + 32)
    elif event == "cut":
        subprocess.run(os.environ["STORY_CUT"].split(), check=True)
        before = seen()
        until("it goes on alone", lambda: latest_world() == 1 and seen() > before + 32)
    elif event == "notice":
        gcs = ray._raylet.GcsClient(address=cluster.gcs_address)
        taken, reason = gcs.drain_node(
            nodes[-1].node_id, 2, "the cloud takes it back", int(time.time() * 1000) + 30_000
        )
        assert taken, reason
        run_folder = Path(config.storage, config.name, "checkpoints")
        every = config.checkpoint_every_images // config.global_batch
        def unscheduled():
            return [p for p in run_folder.glob("step_*/meta.json")
                    if int(p.parent.name[5:]) % every]
        until("a checkpoint was saved at the notice", unscheduled, timeout=30)
        before = seen()
        time.sleep(1)
        cluster.remove_node(nodes.pop(), allow_graceful=False)
        until("it goes on without that node", lambda: latest_world() == 2 and seen() > before + 32)
training.join(300)
print("OUTCOME", json.dumps(outcome), flush=True)
ray.shutdown()
if cluster:
    cluster.shutdown()
"""


def tell(
    story: list[str], config, where: tuple[str, ...] = (), **environment: str
) -> tuple[list[str], dict]:
    """Run a story in a process of its own; its events, and the answer of the run."""
    folder = tempfile.mkdtemp(prefix="je", dir="/tmp")
    try:
        done = subprocess.run(
            [*where, sys.executable, "-c", STORY, config.model_dump_json(), *story],
            env=os.environ | {"RAY_TMPDIR": folder} | environment,
            capture_output=True,
            text=True,
            timeout=880,
            check=False,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    lines = done.stdout.splitlines()
    (answer,) = json.loads(next(s for s in lines if s.startswith("OUTCOME"))[8:])
    assert isinstance(answer, dict), answer
    return [s for s in lines if s.startswith("STORY")], answer


def batches_were_those_of_an_unbroken_run(data: Path, config) -> None:
    """Every id that was ever drawn for a place is the one that belongs there."""
    loader = Loader(
        str(data), read_manifest(str(data)), config.loader, seed=config.seed,
        global_batch=config.global_batch,
    )  # fmt: skip
    expected: dict[int, int] = {}
    stream = loader.batches()
    while len(expected) < config.total_images:
        batch = next(stream)
        expected |= dict(zip(batch.index.tolist(), batch.id.tolist(), strict=True))
    stream.close()
    drawn: dict[int, int] = {}
    for file in Path(config.storage).glob("ids-*.jsonl"):
        for line in file.read_text().splitlines():
            if not line.endswith("]]"):
                continue  # its process was killed here
            _, index, ids = json.loads(line)
            for place, id in zip(index, ids, strict=True):
                if place < config.total_images:
                    assert expected[place] == id
                    drawn[place] = id
    assert sorted(drawn) == list(range(config.total_images))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("workers", "steps", "events"),
    [
        ("2:4", 200, ["lose:2", "gain:2:4"]),
        ("2:8", 500, ["gain:4:8", "lose:4", "lose:2"]),
    ],
)
def test_a_run_shrinks_when_a_node_is_lost_and_grows_when_one_comes(
    workers: str, steps: int, events: list[str], tiny_dataset, tmp_path
):
    """It begins on two nodes of two CPUs."""
    config = config_for(
        tiny_dataset, tmp_path, workers=workers, total_images=16 * steps,
        checkpoint_every_images=64, resize_every_s=2, max_failures=5, micro_batch=16,
        loader={"lanes": 8, "window": 2},
    )  # fmt: skip

    story, answer = tell(events, config)

    assert len(story) == 1 + len(events), story
    assert answer["images_seen"] == 16 * steps
    found = checkpoints.newest(str(tmp_path / "run"))
    assert found is not None
    assert found.meta.images_seen == 16 * steps
    batches_were_those_of_an_unbroken_run(tiny_dataset, config)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_notice_that_a_node_will_go_makes_a_checkpoint_in_time(tiny_dataset, tmp_path):
    config = config_for(
        tiny_dataset, tmp_path, workers="2:4", total_images=16 * 160, checkpoint_every_images=1600,
        max_failures=5, micro_batch=16, keep_checkpoints=9,
    )  # fmt: skip

    story, answer = tell(["notice"], config)

    assert len(story) == 3, story
    assert answer["images_seen"] == 16 * 160
    batches_were_those_of_an_unbroken_run(tiny_dataset, config)


@pytest.fixture
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces, 10.77.7.1 and 10.77.7.2, joined by a pair of virtual cables."""
    names = f"jit-a{os.getpid()}", f"jit-b{os.getpid()}"
    cables = f"ja{os.getpid() % 10**6}", f"jb{os.getpid() % 10**6}"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs root and iproute2 to make network namespaces")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
    except subprocess.CalledProcessError as error:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        pytest.skip(f"this machine does not let us make network namespaces: {error.stderr}")
    for number, (name, cable) in enumerate(zip(names, cables, strict=True), 1):
        ip("link", "set", cable, "netns", name)
        ip("-n", name, "link", "set", cable, "name", "eth9")
        ip("-n", name, "addr", "add", f"10.77.7.{number}/24", "dev", "eth9")
        ip("-n", name, "link", "set", "eth9", "up")
        ip("-n", name, "link", "set", "lo", "up")
    yield names
    for name in names:
        inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
        for pid in inside.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        ip("netns", "delete", name)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_host_that_is_cut_off_is_given_up_and_the_run_goes_on(
    two_hosts, tiny_dataset, tmp_path, short_tmp
):
    """Gradients go through a real network, of which one end is then pulled."""
    here, there = two_hosts
    environment = {
        "GLOO_SOCKET_IFNAME": "eth9",
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "1000",
        "RAY_health_check_failure_threshold": "5",
    }
    start = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--num-cpus=1"]
    starts = {
        here: [
            "--head", "--port=6399", "--node-ip-address=10.77.7.1", "--include-dashboard=true",
            f"--temp-dir={short_tmp}",
        ],
        there: ["--address=10.77.7.1:6399", "--node-ip-address=10.77.7.2"],
    }  # fmt: skip
    for host, options in starts.items():
        log = (short_tmp / f"{host}.log").open("w")
        process = subprocess.Popen(
            ["ip", "netns", "exec", host, *start, *options],
            env=os.environ | environment, stdout=log, stderr=log,
        )  # fmt: skip
        while "Ray runtime started" not in Path(log.name).read_text():
            assert process.poll() is None, Path(log.name).read_text()
            time.sleep(0.2)
    config = config_for(
        tiny_dataset, tmp_path, workers="1:2", total_images=16 * 160, checkpoint_every_images=64,
        resize_every_s=300, max_failures=5, micro_batch=16,
    )  # fmt: skip

    story, answer = tell(
        ["cut"],
        config,
        where=("ip", "netns", "exec", here),
        STORY_ADDRESS="10.77.7.1:6399",
        STORY_CUT=f"ip -n {there} link set eth9 down",
        **environment,
    )

    assert len(story) == 2, story
    assert answer["images_seen"] == 16 * 160
    batches_were_those_of_an_unbroken_run(tiny_dataset, config)


def test_an_elastic_run_has_only_numbers_of_workers_that_share_evenly(tiny_dataset, tmp_path):
    def world_sizes(workers: str, **changes) -> list[int]:
        return config_for(tiny_dataset, tmp_path, workers=workers, **changes).world_sizes

    big = {"loader": {"lanes": 64}, "global_batch": 1024, "micro_batch": 128}
    assert world_sizes("2:8", **big) == [2, 4, 8]
    assert world_sizes("3:40", **big) == [4, 8, 16, 32]
    assert world_sizes("2", **big) == [2]
    assert world_sizes("1:99999999999", **big) == [1, 2, 4, 8, 16, 32, 64]  # a worker has a lane
    with pytest.raises(ValueError, match=r"workers 65:99999999999: none of these .*lanes 64"):
        world_sizes("65:99999999999", **big)
    with pytest.raises(ValueError, match="lanes 64 cannot be dealt evenly to 128 workers"):
        world_sizes("128", **big)
    with pytest.raises(ValueError, match=r"workers 5:7: none of these numbers deals .*lanes 64"):
        world_sizes("5:7", **big)
    with pytest.raises(ValueError, match=r"workers 2:7: none .*: micro_batch 5 does not divide"):
        world_sizes("2:7", **big | {"micro_batch": 5})  # not: that 7 does not divide the lanes
    with pytest.raises(ValueError, match=r"workers 2:8: none .*: parallel.shard_size 16 does not"):
        world_sizes("2:8", **big, parallel={"shard_size": 16})
    with pytest.raises(ValueError, match="workers 8:2: 8 is more than 2"):
        world_sizes("8:2", **big)
    with pytest.raises(ValueError, match="String should match pattern"):
        world_sizes("2-8", **big)


@pytest.mark.parametrize(
    ("room", "spare", "expected"),
    [(9, 0, 8), (8, 0, 8), (7, 0, 4), (3, 0, 2), (1, 0, 0), (9, 1, 8), (8, 1, 4), (2, 1, 0)],
)
def test_room_for_seven_workers_is_used_by_four_and_a_judge_keeps_its_place(
    room: int, spare: int, expected: int, monkeypatch
):
    cpus = {"CPU": float(room)}
    nodes = [
        {"NodeID": "here", "Alive": True, "Resources": cpus},
        {"NodeID": "gone", "Alive": False, "Resources": {"CPU": 8.0}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    scaling = ray.train.ScalingConfig(num_workers=(2, 8))
    policy = WholeLanes(scaling, [2, 4, 8], spare)

    assert policy._count_possible_workers({"here": cpus, "gone": {"CPU": 8.0}}) == expected

"""What a cluster has, and what it may still get."""

import contextlib
import time
from pathlib import Path

import pytest

from pipelines import runtime


def test_workers_that_may_still_come_are_counted_and_the_head_is_not(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text(
        """
max_workers: 10
head_node_type: head
available_node_types:
  head: {resources: {CPU: 8}}
  gpu: {resources: {CPU: 96, GPU: 8}, max_workers: 4}
  cpu: {resources: {CPU: 16}, max_workers: 100}
"""
    )
    assert runtime.launchable(file) == {"CPU": 4 * 96 + 10 * 16, "GPU": 32}
    assert runtime.launchable(tmp_path / "other.yaml") == {}


def test_the_projects_own_cluster_may_start_gpus(repository: Path):
    assert runtime.launchable(repository / "cluster.yaml")["GPU"] >= 8


@pytest.mark.ray
def test_a_local_cluster_has_what_it_has(ray_cluster):
    assert runtime.capacity() == {"CPU": 4, "GPU": 0}


@pytest.mark.ray
def test_leaving_a_loop_early_lets_running_tasks_end_and_the_rest_do_nothing(ray_cluster, tmp_path):
    import ray.data

    runtime.quiet_data()
    stop, begun, ended = runtime.Stop(), tmp_path / "begun", tmp_path / "ended"
    begun.mkdir()
    ended.mkdir()

    def work(row: dict[str, int]) -> dict[str, int]:
        if not stop.is_set():
            (begun / str(row["n"])).touch()
            time.sleep(0.05)
            (ended / str(row["n"])).touch()
        return row

    rows = ray.data.from_items([{"n": n} for n in range(200)], override_num_blocks=200)
    with contextlib.closing(stop.rows(rows.map(work, num_cpus=1))) as done:
        next(done)

    names = {path.name for path in begun.iterdir()}
    assert names == {path.name for path in ended.iterdir()}, "a task was cut off"
    assert 1 <= len(names) < 200
    assert not stop.is_set()

import itertools
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipelines import images, loader, storage
from pipelines.config import LoaderConfig
from pipelines.loader import Batch, DamagedData, Loader, threads_here
from pipelines.shards import read_manifest

CONFIG = LoaderConfig(lanes=4, window=2)


def open_loader(folder: Path, **options) -> Loader:
    options = {"seed": 3, "global_batch": 8, "config": CONFIG} | options
    return Loader(str(folder), read_manifest(str(folder)), **options)


def take(source: Loader, n: int, images_seen: int = 0) -> list[Batch]:
    stream = source.batches(images_seen)
    batches = list(itertools.islice(stream, n))
    stream.close()
    return batches


def ids(batches: list[Batch]) -> list[int]:
    return torch.cat([b.id for b in batches]).tolist()


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def test_a_batch_holds_the_stored_pixels_and_labels_of_its_ids(tiny_dataset: Path):
    stored = {}
    for file in sorted((tiny_dataset / "data").iterdir()):
        for row in pq.read_table(file).to_pylist():
            stored[row["id"]] = images.decode_pixels(row["image"]["bytes"]), row["label"]

    batches = take(open_loader(tiny_dataset), 3)

    assert torch.cat([b.index for b in batches]).tolist() == list(range(24))
    for batch in batches:
        assert batch.pixels.shape == (8, 3, 28, 28)
        assert batch.pixels.dtype == torch.uint8
        for pixels, label, id in zip(batch.pixels, batch.label, batch.id, strict=True):
            expected, expected_label = stored[int(id)]
            assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)
            assert label == expected_label


def test_an_epoch_has_each_image_once_and_batches_run_over_its_end(tiny_dataset: Path):
    drawn = ids(take(open_loader(tiny_dataset), 54))  # 54 * 8 = 432 = 2 * 211 + 10

    assert sorted(drawn[:211]) == list(range(211))
    assert sorted(drawn[211:422]) == list(range(211))
    assert drawn[:211] != drawn[211:422]


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_global_batches_are_the_same_for_any_number_of_workers(tiny_dataset: Path, world_size):
    alone = take(open_loader(tiny_dataset), 40)

    shares = [
        take(open_loader(tiny_dataset, rank=rank, world_size=world_size), 40)
        for rank in range(world_size)
    ]

    for number, whole in enumerate(alone):
        index = torch.cat([share[number].index for share in shares])
        order = index.argsort()
        assert torch.equal(index[order], whole.index)
        for name in ("pixels", "label", "id"):
            together = torch.cat([getattr(share[number], name) for share in shares])
            assert torch.equal(together[order], getattr(whole, name))


def test_the_stream_goes_on_from_any_image(tiny_dataset: Path):
    unbroken = ids(take(open_loader(tiny_dataset), 40))

    for images_seen in (8, 13, 208, 212):
        rest = ids(take(open_loader(tiny_dataset), 5, images_seen))
        assert rest == unbroken[images_seen : images_seen + 40]


def test_a_worker_decodes_with_its_share_of_the_machine(monkeypatch: pytest.MonkeyPatch):
    for cpus, workers, threads in ((2, 2, 2), (16, 4, 4), (192, 8, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cpus=cpus: set(range(cpus)))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(workers))
        assert threads_here() == threads


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("threads", [1, 3])
def test_decoding_ahead_changes_no_batch(tiny_dataset: Path, prefetch: int, threads: int):
    expected = take(open_loader(tiny_dataset), 12)
    config = CONFIG.model_copy(update={"prefetch": prefetch, "threads": threads})

    found = take(open_loader(tiny_dataset, config=config), 12)

    assert ids(found) == ids(expected)
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(found, expected, strict=True))


def test_micro_batches_are_the_share_in_pieces(tiny_dataset: Path):
    share = ids(take(open_loader(tiny_dataset, rank=1, world_size=2), 30))

    pieces = take(open_loader(tiny_dataset, rank=1, world_size=2, micro_batch=2), 60)

    assert {len(b.id) for b in pieces} == {2}
    assert ids(pieces) == share


def test_a_lane_of_a_lone_row_group_serves_many_lanes(tiny_dataset: Path, tmp_path: Path):
    folder = copy_of(tiny_dataset, tmp_path / "one")
    manifest = read_manifest(str(folder))
    shard = manifest.shards[2]
    table = pq.read_table(folder / shard.file)
    pq.write_table(table, folder / shard.file, row_group_size=1000)
    one = shard.model_copy(
        update={"row_groups": [51], "bytes": (folder / shard.file).stat().st_size}
    )
    manifest = manifest.model_copy(update={"shards": [one]})
    config = LoaderConfig(lanes=16, window=4, threads=1)

    source = Loader(str(folder), manifest, config, seed=0, global_batch=16)

    assert sorted(ids(take(source, 51))[:51]) == list(range(160, 211))


def test_every_row_group_is_read_once_an_epoch_but_for_the_cuts(tiny_dataset: Path, monkeypatch):
    source = open_loader(tiny_dataset)
    reads = []
    read = source.reader.read
    monkeypatch.setattr(source.reader, "read", lambda group: reads.append(group) or read(group))

    take(source, 24)  # 192 of 211 rows, in 14 row groups, cut in 3 places

    assert len(set(reads)) == 14
    assert len(reads) <= 14 + 3


def test_a_missing_shard_is_named(tiny_dataset: Path, tmp_path: Path):
    folder = copy_of(tiny_dataset, tmp_path / "copy")
    (folder / "data/train-00001-of-00003.parquet").unlink()

    with pytest.raises(FileNotFoundError, match="train-00001-of-00003"):
        take(open_loader(folder), 20)


def test_a_shard_of_another_size_or_cut_is_named(tiny_dataset: Path, tmp_path: Path):
    folder = copy_of(tiny_dataset, tmp_path / "copy")
    file = folder / "data/train-00000-of-00003.parquet"
    file.write_bytes(file.read_bytes()[:-10])

    with pytest.raises(ValueError, match=r"train-00000-of-00003.*bytes, the manifest says"):
        take(open_loader(folder), 20)

    manifest = json.loads((folder / "manifest.json").read_text())
    shutil.copy(tiny_dataset / "data/train-00000-of-00003.parquet", file)
    manifest["shards"][0]["row_groups"] = [40, 40]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"row groups of \[16, 16, 16, 16, 16\] rows, the man"):
        take(open_loader(folder), 20)


def test_a_label_without_a_class_and_a_broken_image_name_shard_and_row(
    tiny_dataset: Path, tmp_path: Path
):
    manifest = read_manifest(str(tiny_dataset))
    fewer = manifest.model_copy(update={"classes": manifest.classes[:9]})
    source = Loader(str(tiny_dataset), fewer, CONFIG, seed=0, global_batch=8)

    with pytest.raises(
        ValueError, match=r"row \d+ in row group \d of .*parquet has label 9, .*9 classes"
    ):
        take(source, 27)

    folder = copy_of(tiny_dataset, tmp_path / "copy")
    file = folder / "data/train-00002-of-00003.parquet"
    content = file.read_bytes()
    at = content.index(b"\x89PNG")
    file.write_bytes(content[:at] + b"JUNK" + content[at + 4 :])
    with pytest.raises(ValueError, match=r"row 0 in row group 0 of .*train-00002.* is no image"):
        take(open_loader(folder), 27)


def test_a_row_group_that_cannot_be_read_is_named_with_what_to_do(
    tiny_dataset: Path, tmp_path: Path
):
    folder = copy_of(tiny_dataset, tmp_path / "copy")
    file = folder / "data/train-00002-of-00003.parquet"
    content = bytearray(file.read_bytes())
    at = content.index(b"\x89PNG") - 4  # Parquet notes the length before the bytes
    content[at : at + 4] = b"\xff\xff\xff\x7f"
    file.write_bytes(content)

    with pytest.raises(
        DamagedData, match=r"row group 0 of .*train-00002.* is damaged: .*prepare --verify"
    ):
        take(open_loader(folder), 27)


def test_numbers_that_do_not_fit_are_refused(tiny_dataset: Path):
    with pytest.raises(ValueError, match=r"global_batch 10 is not a multiple of .*lanes 4"):
        open_loader(tiny_dataset, global_batch=10)
    with pytest.raises(ValueError, match="micro_batch 3 does not divide 8"):
        open_loader(tiny_dataset, micro_batch=3)
    with pytest.raises(ValueError, match="4 lanes cannot be dealt evenly to 3 workers"):
        open_loader(tiny_dataset, world_size=3)


def test_a_loader_that_stalls_says_so(tiny_dataset: Path, monkeypatch, caplog):
    monkeypatch.setattr(loader, "STALL_S", 0.05)
    open_input = storage.open_input

    def slow(uri: str):
        import time

        time.sleep(0.2)
        return open_input(uri)

    monkeypatch.setattr(storage, "open_input", slow)
    with caplog.at_level(logging.WARNING):
        take(open_loader(tiny_dataset), 1)

    assert "the loader has waited" in caplog.text
    assert "images 0 .. 7" in caplog.text

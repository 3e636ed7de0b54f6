"""Preparation from and to S3: a store that fails, credentials that expire, secrets that stay."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import uuid
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from PIL import Image

from pipelines import job, lease, prepare, shards, sources, storage
from pipelines.cli import main
from pipelines.config import PrepareConfig
from pipelines.index import Index

NUM_IMAGES = 3 * 40


def _tar(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def archive() -> bytes:
    """A tar of tars: three of ImageNet's classes, 40 images each."""
    inner = []
    for label, wnid in enumerate(["n01440764", "n01443537", "n01484850"]):
        images = []
        for i in range(40):
            pixels = np.random.default_rng([label, i]).integers(0, 256, (40, 44, 3), np.uint8)
            buffer = BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            images.append((f"{wnid}_{i}.png", buffer.getvalue()))
        inner.append((f"{wnid}.tar", _tar(images)))
    return _tar(inner)


@pytest.fixture(scope="module")
def local(ray_cluster: None, archive: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive as a dataset folder, without S3."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "train.tar").write_bytes(archive)
    prepare.run(_config(str(folder / "train.tar"), str(folder / "dataset")))
    return folder / "dataset"


def _config(source: str, output: str, **fields: Any) -> PrepareConfig:
    small = {"image_size": 32, "rows_per_shard": 16, "rows_per_group": 5, "encoding": "png"}
    return PrepareConfig.model_validate({"source": source, "output": output} | small | fields)


def _run(
    source: str, output: str, environment: dict[str, str], *more: str
) -> subprocess.CompletedProcess[str]:
    """The command, on the cluster of the tests, whose workers get these variables as well."""
    command = [sys.executable, "-m", "pipelines.prepare", "--source", source, "--output", output]
    command += ["--image-size", "32", "--rows-per-shard", "16", "--rows-per-group", "5"]
    described = {"runtime_env": {"env_vars": environment}}
    here = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    here["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps(described)
    return subprocess.run(
        [*command, "--encoding", "png", *more], env=os.environ | environment | here,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def _digests(output: str) -> dict[str, str]:
    """Digests of what does not depend on where the source is, and the manifest's fingerprint."""
    elsewhere = (shards.MANIFEST, shards.SOURCE)
    files = [f for f in storage.list_files(output) if f.relative not in elsewhere]
    digests = {f.relative: hashlib.sha256(storage.read_bytes(f.uri)).hexdigest() for f in files}
    return digests | {"fingerprint": shards.read_manifest(output).fingerprint}


def _point_to(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.ray
def test_a_store_that_fails_every_fourth_request_gives_equal_bytes_and_no_secrets(
    local: Path, archive: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    faulty_store: Any, faulty_environment: dict[str, str], s3_environment: dict[str, str],
) -> None:  # fmt: skip
    environment = faulty_environment | {"JIT_CACHE": str(tmp_path / "cache")}
    root = f"s3://bucket/{uuid.uuid4().hex}"
    _point_to(s3_environment, monkeypatch)
    storage.write_bytes(f"{root}/train.tar", archive)
    faulty_store.away_after = 300  # while shards are written

    done = _run(f"{root}/train.tar", f"{root}/dataset", environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert faulty_store.seen["requests"] > 320
    assert "listing 3 of 3 tars" in done.stderr
    assert "WARNING" not in done.stderr  # Ray had one for what it could not make a column of
    assert re.search(r"shard 8/8, image 120/120, \d+ images/s, \d+\.\d MB/s, 0 rejects, 0 s left",
                     done.stderr)  # fmt: skip
    assert min(faulty_store.seen[kind] for kind in ("slow_down", "reset", "truncate")) >= 3

    assert _digests(f"{root}/dataset") == _digests(str(local))
    assert shards.verify(f"{root}/dataset") == []
    with monkeypatch.context() as patch:  # again, it does not list the million headers
        patch.setattr(sources, "write_index", None)
        prepare.run(_config(f"{root}/train.tar", f"{root}/dataset"))
    secret = s3_environment["AWS_SECRET_ACCESS_KEY"]
    assert secret not in done.stderr + done.stdout
    for entry in storage.list_files(f"{root}/dataset"):
        assert secret.encode() not in storage.read_bytes(entry.uri), entry.relative


@pytest.mark.ray
def test_credentials_that_expire_are_one_line_and_new_ones_go_on(
    local: Path, archive: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    faulty_store: Any, faulty_environment: dict[str, str], s3_environment: dict[str, str],
) -> None:  # fmt: skip
    environment = faulty_environment | {"JIT_CACHE": str(tmp_path / "cache")}
    root = f"s3://bucket/{uuid.uuid4().hex}"
    _point_to(s3_environment, monkeypatch)
    storage.write_bytes(f"{root}/train.tar", archive)
    faulty_store.slow_down = faulty_store.reset = faulty_store.truncate = 0.0
    faulty_store.code_after = (230, "ExpiredToken")  # while shards are written

    done = _run(f"{root}/train.tar", f"{root}/dataset", environment)
    assert done.returncode == 2, done.stderr
    assert faulty_store.seen["passed"] == 230
    errors = [line for line in done.stderr.splitlines() if "have expired" in line]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("error: the credentials for s3://bucket/")
    assert "Traceback" not in done.stderr
    with pytest.raises(FileNotFoundError, match="no manifest"):
        shards.read_manifest(f"{root}/dataset")

    shard = f"{root}/dataset/data/train-00003-of-00008.parquet".removeprefix("s3://bucket/")
    storage._client().create_multipart_upload(Bucket="bucket", Key=shard)  # as SIGKILL leaves it
    faulty_store.code_after = None
    done = _run(f"{root}/train.tar", f"{root}/dataset", environment)
    assert done.returncode == 0, done.stderr
    left = storage._client().list_multipart_uploads(Bucket="bucket", Prefix=shard)
    assert "Uploads" not in left
    assert "going on with what was interrupted" in done.stderr
    assert _digests(f"{root}/dataset") == _digests(str(local))


@pytest.mark.ray
def test_verification_and_parquet_are_read_from_a_store_that_fails(
    local: Path, monkeypatch: pytest.MonkeyPatch, faulty_store: Any,
    faulty_environment: dict[str, str], tmp_path: Path,
) -> None:  # fmt: skip
    _point_to(faulty_environment, monkeypatch)
    faulty_store.reset = faulty_store.truncate = 0.15
    root = f"s3://bucket/{uuid.uuid4().hex}"
    storage.publish_folder(local, root, last=shards.MANIFEST)
    assert shards.verify(root) == []
    refs = {}
    for uri in (root, str(local)):
        source = sources.open_source(uri)
        sources.write_index(source, tmp_path / "index")
        listed = Index(tmp_path / "index").refs(range(120))
        refs[uri] = {listed[i].path: image for i, image in sources.read_images(uri, listed)}
    assert refs[root] == refs[str(local)]
    assert min(faulty_store.seen[kind] for kind in ("slow_down", "reset", "truncate")) >= 3


def test_an_object_that_may_not_be_read_is_a_reject_unless_none_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faulty_store: Any,
    faulty_environment: dict[str, str],
) -> None:  # fmt: skip
    _point_to(faulty_environment, monkeypatch)
    faulty_store.slow_down = faulty_store.reset = faulty_store.truncate = 0.0
    root = f"s3://bucket/{uuid.uuid4().hex}"
    for i in range(3):
        storage.write_bytes(f"{root}/a/{i}.png", b"image %d" % i)
    source = sources.open_source(root)
    sources.write_index(source, tmp_path / "index")
    refs = Index(tmp_path / "index").refs(range(3))
    faulty_store.denied = "/a/1.png"
    found = dict(sources.read_images(root, refs))
    assert found == {0: b"image 0", 1: "unreadable: the store refuses it", 2: b"image 2"}
    faulty_store.denied = "/a/"
    with pytest.raises(PermissionError, match=r"refuses the credentials \(AccessDenied\)"):
        list(sources.read_images(root, refs))


@pytest.mark.ray
def test_credentials_that_expire_during_verification_are_no_damage(
    local: Path, monkeypatch: pytest.MonkeyPatch, faulty_store: Any,
    faulty_environment: dict[str, str],
) -> None:  # fmt: skip
    _point_to(faulty_environment, monkeypatch)
    faulty_store.slow_down = faulty_store.reset = faulty_store.truncate = 0.0
    root = f"s3://bucket/{uuid.uuid4().hex}"
    storage.publish_folder(local, root, last=shards.MANIFEST)
    assert shards.verify(root) == []
    for requests in (1, 9):  # while the first shard is opened, and when some have been read
        faulty_store.code_after = (faulty_store.seen["requests"] + requests, "ExpiredToken")
        with pytest.raises(PermissionError, match="have expired"):
            shards.verify(root)


@pytest.mark.ray
def test_a_store_that_goes_away_during_verification_is_no_damage(
    local: Path, monkeypatch: pytest.MonkeyPatch, faulty_store: Any,
    faulty_environment: dict[str, str], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    _point_to(faulty_environment, monkeypatch)
    faulty_store.slow_down = faulty_store.reset = faulty_store.truncate = 0.0
    root = f"s3://bucket/{uuid.uuid4().hex}"
    storage.publish_folder(local, root, last=shards.MANIFEST)
    faulty_store.away_after = faulty_store.seen["requests"] + 9  # when some have been read
    assert shards.verify(root) == []

    monkeypatch.setattr(storage, "DEADLINE_S", 0.5)
    faulty_store.away_after = faulty_store.seen["requests"] + 9
    assert main(["prepare", "--verify", root]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert re.search(rf"^error: {root}/data/.*(connect|closed)", errors[0])
    assert "damaged" not in errors[0]


@pytest.mark.ray
def test_a_tar_that_may_not_be_listed_ends_in_one_line(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faulty_store: Any,
    faulty_environment: dict[str, str], archive: bytes,
) -> None:  # fmt: skip
    _point_to(faulty_environment, monkeypatch)
    faulty_store.slow_down = faulty_store.reset = faulty_store.truncate = 0.0
    root = f"s3://bucket/{uuid.uuid4().hex}"
    with tarfile.open(fileobj=io.BytesIO(archive)) as outer:
        for member in outer:  # one tar a class
            content = outer.extractfile(member)
            assert content is not None
            storage.write_bytes(f"{root}/train/{member.name}", content.read())
    faulty_store.denied = "/n01443537.tar"
    done = _run(f"{root}/train", f"{root}/dataset", faulty_environment)
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if "refuses" in line]
    assert len(said) == 1, done.stderr
    assert said[0].startswith(f"error: {root}/train/n01443537.tar: the store refuses")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (ValueError("a tar is damaged"), "ValueError"),
        (FileNotFoundError(2, "no such file", "s3://bucket/a.tar"), "FileNotFoundError"),
        (storage.ObjectRefused("the store refuses it"), "PermissionError"),
        (storage.ShortRead(61, "it ends before the range", "s3://bucket/a.tar"), ""),
        (storage.StoreFailed("could not connect"), ""),
        (KeyError("unforeseen"), ""),
    ],
)
def test_a_list_that_fails_is_an_error_that_the_command_line_knows(
    failure: Exception, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(sources, "list_parts", fail)
    part = json.dumps(sources.Part("a.tar", "a"))
    source = sources.Files(str(tmp_path), [], [])
    place = str(tmp_path / "list.arrow")
    stop = SimpleNamespace(is_set=lambda: False)
    batch = {"place": np.array([place]), "part": np.array([part])}
    answer = prepare._list_parts_task(batch, source=source, stop=stop)  # type: ignore[arg-type]
    assert answer["kind"] == [kind]
    assert str(failure) in answer["error"][0]


def test_an_empty_folder_that_the_store_keeps_is_no_stranger(
    s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    output = f"s3://bucket/{uuid.uuid4().hex}/dataset"
    storage.write_bytes(f"{output}/data/old.parquet", b"old")
    with pytest.raises(ValueError, match=r"is not empty.*it holds 'data'"):
        job.refuse_strangers(output)

    # emptied, begun, and killed before it is said what is made
    storage.delete(output)
    storage.write_bytes(f"{output}/_work/writer/1.json", b"{}")
    assert "data" in storage.list_folder(output)[0], "this store drops empty folders"

    job.refuse_strangers(output)


@pytest.mark.ray
@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_second_writer_is_refused_by_name(
    local: Path, tmp_path: Path, where: str, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    output = str(tmp_path / "dataset")
    if where == "s3":
        _point_to(request.getfixturevalue("s3_environment"), monkeypatch)
        output = f"s3://bucket/{uuid.uuid4().hex}"
    source = str(local.parent / "train.tar")
    with lease.claim(storage.join(output, job.WORK, "writer")):
        with pytest.raises(PermissionError, match=rf"written by .*process {os.getpid()} on "):
            prepare.run(_config(source, output))
        assert [f.relative for f in storage.list_files(output)] == ["_work/writer/00001.json"]
    if where == "local":
        prepare.run(_config(source, output))
        assert _digests(output) == _digests(str(local))


@pytest.mark.ray
def test_a_pass_for_two_sizes_makes_what_two_passes_make(
    local: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = str(local.parent / "train.tar")
    prepare.run(_config(source, str(tmp_path / "both"), image_size=(32, 16)))
    prepare.run(_config(source, str(tmp_path / "small"), image_size=16))
    assert sorted(f.name for f in (tmp_path / "both").iterdir()) == ["16", "32"]
    for size, alone in ((32, local), (16, tmp_path / "small")):
        folder = str(tmp_path / "both" / str(size))
        assert _digests(folder) == _digests(str(alone))
        manifest = storage.read_bytes(f"{folder}/manifest.json")
        assert manifest == storage.read_bytes(f"{alone}/manifest.json")
    with caplog.at_level("INFO"):
        prepare.run(PrepareConfig(verify=str(tmp_path / "both")))
    assert caplog.text.count("is sound: 120 images in 8 shards") == 2
    prepare.run(_config(source, str(tmp_path / "both"), image_size=(32, 16)))  # finished already
    with pytest.raises(ValueError, match=r"both is not empty.*it holds '16'"):
        prepare.run(_config(source, str(tmp_path / "both"), image_size=(32, 8)))


@pytest.mark.ray
def test_the_list_of_a_tar_goes_on_where_it_was_interrupted(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, output = str(local.parent / "train.tar"), str(tmp_path / "dataset")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "describe", killed)  # comes after the list
        with pytest.raises(KeyboardInterrupt):
            prepare.run(_config(source, output))
    kept = sorted((tmp_path / "dataset" / "_work" / "index").iterdir())
    assert len(kept) == 3
    kept[0].unlink()
    with caplog.at_level("INFO"):
        prepare.run(_config(source, output))
    assert "listing 1 of 3 tars" in caplog.text
    assert _digests(output) == _digests(str(local))


def test_a_dry_run_on_s3_says_what_comes_and_writes_nothing(
    archive: bytes, s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    _point_to(s3_environment, monkeypatch)
    root = f"s3://bucket/{uuid.uuid4().hex}"
    storage.write_bytes(f"{root}/train.tar", archive)
    with caplog.at_level("INFO"):
        config = _config(f"{root}/train.tar", f"{root}/out", image_size=(32, 16), dry_run=True)
        prepare.run(config)
        monkeypatch.setattr(prepare, "SAMPLE_PARTS", 2)
        prepare.run(config)
    assert "120 images of 3 classes -> 8 shards of 16" in caplog.text
    assert re.search(r"/out/32: about 0\.000\d+ GB", caplog.text)
    assert "about 120 images of 3 classes" in caplog.text
    assert re.search(
        r"64 images tried, 0 of them cannot be used; about \S+ core-hours", caplog.text
    )
    assert [f.relative for f in storage.list_files(root)] == ["train.tar"]

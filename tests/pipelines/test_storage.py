"""Files are found, read and published alike in local folders and on a real S3 server."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import re
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import botocore.exceptions
import pytest

from pipelines import job, storage
from pipelines.cli import main
from tests import uris


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A URI below which nothing is yet."""
    if request.param == "local":
        return str(tmp_path / "root")
    for name, value in request.getfixturevalue("s3_environment").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JIT_CACHE", str(tmp_path / "cache"))
    return f"s3://bucket/{uuid.uuid4().hex}"


def test_what_is_written_is_found_read_and_deleted(root: str) -> None:
    names = ["b/x.bin", "a b/y.JPEG", "a/z.png", "top.json"]
    for name in names:
        storage.write_bytes(storage.join(root, name), name.encode())
    storage.write_json(storage.join(root, "top.json"), {"ä": [1]})

    found = storage.list_files(root)
    assert [entry.relative for entry in found] == ["a b/y.JPEG", "a/z.png", "b/x.bin", "top.json"]
    assert [storage.read_bytes(e.uri)[:3] for e in found[:3]] == [b"a b", b"a/z", b"b/x"]
    assert found[0].bytes == len("a b/y.JPEG")
    images = storage.list_files(root, suffixes=(".jpeg", ".png"))
    assert [entry.relative for entry in images] == ["a b/y.JPEG", "a/z.png"]
    folders, files = storage.list_folder(root)
    assert folders == ["a", "a b", "b"]
    assert [entry.relative for entry in files] == ["top.json"]

    assert storage.read_json(storage.join(root, "top.json")) == {"ä": [1]}
    assert storage.read_bytes(storage.join(root, "b/x.bin"), 2, 3) == b"x.b"
    with storage.open_input(storage.join(root, "b/x.bin")) as file:
        file.seek(2)
        assert file.read(1) == b"x"
    with pytest.raises(OSError, match=r"short read, 5 bytes.*x\.bin"):
        storage.read_bytes(storage.join(root, "b/x.bin"), 2, 30)

    assert storage.exists(storage.join(root, "a"))
    assert storage.exists(storage.join(root, "a/z.png"))
    assert not storage.exists(storage.join(root, "a/z"))
    storage.delete(storage.join(root, "a"))
    storage.delete(storage.join(root, "a"))
    assert not storage.exists(storage.join(root, "a"))
    assert storage.exists(storage.join(root, "a b/y.JPEG"))


def test_what_is_missing_is_named(root: str) -> None:
    storage.write_bytes(storage.join(root, "there"), b"")
    missing = storage.join(root, "missing")
    for reading in (storage.read_bytes, storage.list_files, storage.list_folder, storage.fetch):
        with pytest.raises(FileNotFoundError, match="missing"):
            reading(missing)  # type: ignore[operator]


def test_only_the_first_writer_creates_a_file(root: str) -> None:
    place = storage.join(root, "owner.json")
    storage.write_bytes(place, b"first", if_absent=True)
    storage.write_bytes(place, b"first", if_absent=True)  # its own write, repeated
    with pytest.raises(FileExistsError, match=r"owner\.json"):
        storage.write_bytes(place, b"second", if_absent=True)
    assert storage.read_bytes(place) == b"first"
    assert len(storage.list_files(root)) == 1


def test_a_write_that_fails_leaves_nothing(root: str) -> None:
    place = storage.join(root, "file")
    storage.write_bytes(place, b"old")

    def write_half() -> None:
        with storage.staged(place) as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert storage.read_bytes(place) == b"old"
    assert len(storage.list_files(root)) == 1


def test_a_folder_is_published_and_fetched_whole(root: str, tmp_path: Path) -> None:
    source = tmp_path / "made"
    (source / "below").mkdir(parents=True)
    (source / "below" / "a").write_bytes(b"1")
    (source / "config.json").write_bytes(b"2")

    storage.publish_folder(source, storage.join(root, "artifact"), last="config.json")
    folder = storage.fetch(storage.join(root, "artifact"))

    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {
        "below/a",
        "config.json",
    }
    assert storage.fetch(storage.join(root, "artifact")) == folder
    storage.write_bytes(storage.join(root, "artifact/config.json"), b"newer")
    assert (storage.fetch(storage.join(root, "artifact")) / "config.json").read_bytes() == b"newer"
    assert storage.fetch(storage.join(root, "artifact/below/a")).read_bytes() == b"1"


def test_checking_that_a_folder_is_writable_leaves_nothing(root: str) -> None:
    storage.check_writable(storage.join(root, "not/there/yet"))
    assert not storage.exists(root)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"cannot write to .*/file/below"):
        storage.check_writable(str(tmp_path / "file" / "below"))
    with pytest.raises(PermissionError, match="cannot write to /proc/below"):
        storage.check_writable("/proc/below")


def test_a_store_that_refuses_us_says_so_once(
    s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    with pytest.raises(PermissionError, match="s3://bucket/x") as raised:
        storage.check_writable("s3://bucket/x")
    assert "wrong-secret" not in str(raised.value)


@pytest.mark.parametrize(
    "uri",
    ["", "gs://bucket/x", "s3://", "s3:/bucket/x", "file:/x", "hdfs:/x", *uris.WITH_CREDENTIALS],
)
def test_a_uri_that_cannot_be_opened_is_refused(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"expected.* s3://bucket/key$|is not s3") as raised:
        storage.write_bytes(uri, b"")
    assert "SECRET" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", uris.WITHOUT)
def test_an_odd_name_is_no_credential(uri: str) -> None:
    storage.local_path(uri)


def test_a_refused_uri_is_not_shown_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for uri in uris.WITH_CREDENTIALS:
        for option in ("--source", "--output", "--classes", "--labels", "--verify"):
            given = {"--source": str(tmp_path), "--output": str(tmp_path / "out")} | {option: uri}
            assert main(["prepare", *itertools.chain(*given.items())]) == 2
    assert "SECRET" not in "".join(capsys.readouterr())
    assert "SECRET" not in caplog.text


def test_an_endpoint_with_a_password_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:secret@127.0.0.1:9")
    for reading in (storage.read_bytes, storage.open_input, storage.exists):
        with pytest.raises(ValueError, match="endpoint of the S3 store holds a password") as raised:
            reading("s3://bucket/x")
        assert "secret@" not in str(raised.value)


def test_the_endpoint_of_the_aws_config_file_counts_for_all_that_is_read(
    s3_environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    uri = f"s3://bucket/{uuid.uuid4().hex}"
    storage.write_bytes(uri, b"content")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", tmp_path.name)
    (tmp_path / "config").write_text(
        f"[profile {tmp_path.name}]\nendpoint_url = {s3_environment['AWS_ENDPOINT_URL']}\n"
    )
    assert storage.read_bytes(uri) == b"content"
    with storage.open_input(uri) as file:
        assert file.read() == b"content"


def test_links_are_followed_but_loops_pipes_and_odd_names_do_no_harm(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.png").touch()
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "linked").symlink_to(elsewhere)
    (tree / "loop").symlink_to(tree)
    (tree / "gone.png").symlink_to(tree / "nowhere")
    os.mkfifo(tree / "pipe.png")
    Path(os.fsdecode(bytes(tree) + b"/\xff.png")).touch()

    found = [os.fsencode(e.relative) for e in storage.list_files(str(tree), suffixes=(".png",))]

    assert found == [b"gone.png", b"linked/a.png", b"pipe.png", b"\xff.png"]
    for read in (storage.read_bytes, storage.version, storage.Ranges, storage.open_input):
        with pytest.raises(OSError, match="a pipe, socket or device, not a file"):
            read(str(tree / "pipe.png"))


def test_the_order_of_files_is_that_of_their_paths_whatever_was_made_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "NAMES", 2)
    found = []
    for i, steps in enumerate(itertools.permutations(["real", "alias", "zebra", "loop", "files"])):
        top = tmp_path / str(i)
        tree = top / "tree"
        tree.mkdir(parents=True)
        for step in steps:
            if step == "files":
                for name in ("b.png", "a", "a.png", "ab", "real.png"):
                    (tree / name).touch()
            elif step == "real":
                (tree / "real").mkdir()
                (tree / "real" / "1.png").touch()
            else:  # to a sibling, twice, and to what lies above the folder that is listed
                (tree / step).symlink_to(top if step == "loop" else "real")
        found.append([e.relative for e in storage.walk(str(tree))])
    assert found == [found[0]] * 120
    assert found[0] == [
        "a", "a.png", "ab", "alias/1.png", "b.png", "real.png", "real/1.png", "zebra/1.png"
    ]  # fmt: skip


def test_a_store_that_does_not_sort_as_s3_does_gives_the_same_order(
    s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    root = f"s3://bucket/{uuid.uuid4().hex}"
    for name in ("a/1.png", "a.png", "a-b/1.png", "b"):
        storage.write_bytes(f"{root}/{name}", name.encode())
    found = list(storage.walk(root))
    assert [e.relative for e in found] == ["a-b/1.png", "a.png", "a/1.png", "b"]
    assert [storage.read_bytes(e.uri).decode() for e in found] == [e.relative for e in found]
    assert [e.bytes for e in found] == [9, 5, 7, 1]
    assert all(abs(e.changed / 1e9 - time.time()) < 600 for e in found)


def test_a_file_uri_is_a_path_with_escapes(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    storage.write_bytes(f"file://{tmp_path}/a%20b/x%25", b"1")
    assert (tmp_path / "a b" / "x%").read_bytes() == b"1"
    assert [e.relative for e in storage.list_files(f"file://{tmp_path}/a%20b")] == ["x%"]
    assert storage.read_bytes(storage.join(f"file://{tmp_path}/a%20b", "x%")) == b"1"


def test_a_path_in_a_current_folder_that_is_not_utf8_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert storage.absolute(f"{tmp_path}/ä") == f"{tmp_path}/ä"
    odd = tmp_path / os.fsdecode(b"odd\xff")
    odd.mkdir()
    monkeypatch.chdir(odd)
    with pytest.raises(ValueError, match=r"/odd\\xff/below is not UTF-8: rename it"):
        storage.absolute("below")


def test_a_store_that_fails_now_and_then_is_asked_again(
    faulty_store: Any, faulty_environment: dict[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name, value in faulty_environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JIT_CACHE", str(tmp_path / "cache"))
    root = f"s3://bucket/{uuid.uuid4().hex}"
    content = os.urandom(300_000)
    for i in range(20):
        storage.write_bytes(f"{root}/{i:02d}", content[i:], if_absent=i % 2 == 0)
    for i in range(20):
        assert storage.read_bytes(f"{root}/{i:02d}") == content[i:]
        assert storage.read_bytes(f"{root}/{i:02d}", 1000, 5) == content[i + 1000 : i + 1005]
        with storage.open_input(f"{root}/{i:02d}") as file:
            assert file.read() == content[i:]
    assert [entry.bytes for entry in storage.list_files(root)] == [300_000 - i for i in range(20)]
    assert (storage.fetch(root) / "07").read_bytes() == content[7:]
    storage.delete(root)
    assert not storage.exists(root)
    assert min(faulty_store.seen[kind] for kind in ("slow_down", "reset", "truncate")) > 3


def test_a_store_that_nobody_listens_for_is_waited_for(
    faulty_store: Any, faulty_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in faulty_environment.items():
        monkeypatch.setenv(name, value)
    place = f"s3://bucket/{uuid.uuid4().hex}"
    storage.write_bytes(place, b"content")
    away = threading.Thread(target=faulty_store.go_away, args=(2.0,))
    away.start()
    while not faulty_store.is_away:
        time.sleep(0.01)
    assert storage.read_bytes(place) == b"content"
    away.join()


def test_a_store_that_is_not_there_is_told_while_it_is_waited_for_and_in_one_line(
    s3_environment: dict[str, str], free_port: int, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port}")
    monkeypatch.setattr(storage, "DEADLINE_S", 2.0)
    assert main(["prepare", "--verify", "s3://bucket/x"]) == 1
    message = rf"s3://bucket/x.*: Could not connect to the endpoint URL.*:{free_port}"
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert re.search(message, said[0])
    assert len(said) == 1
    assert re.search(r"trying again for 2 s after Could not connect", caplog.text)


@pytest.mark.parametrize(
    "error",
    [
        botocore.exceptions.EndpointConnectionError(endpoint_url="https://x"),
        botocore.exceptions.ConnectTimeoutError(endpoint_url="https://x"),
        botocore.exceptions.SSLError(endpoint_url="https://x", error="closed"),
        botocore.exceptions.ProxyConnectionError(proxy_url="http://proxy"),
        botocore.exceptions.CredentialRetrievalError(provider="role", error_msg="busy"),
        botocore.exceptions.ReadTimeoutError(endpoint_url="https://x"),
    ],
)
def test_a_request_that_did_not_get_through_is_sent_again(error: Exception) -> None:
    tries = iter([error, error, None])

    def request() -> str:
        if failure := next(tries):
            raise failure
        return "answer"

    assert storage._send("s3://bucket/x", request) == "answer"


def test_the_root_of_a_bucket_is_a_folder_as_others_are(
    s3_environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JIT_CACHE", str(tmp_path / "cache"))
    root = f"s3://{uuid.uuid4().hex}"
    assert not storage.exists(root)
    storage._client().create_bucket(Bucket=root.removeprefix("s3://"))
    assert not storage.exists(root)
    storage.write_bytes(f"{root}/letter.txt", b"dear")
    assert storage.exists(root)
    assert storage.exists(f"{root}/")
    assert (storage.fetch(root) / "letter.txt").read_bytes() == b"dear"
    with pytest.raises(ValueError, match=r"is not empty.*it holds 'letter\.txt'"):
        job.refuse_strangers(root)
    storage.delete(f"{root}/letter.txt")
    job.refuse_strangers(root)


def test_a_disk_without_hard_links_is_told_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")  # what exFAT says

    monkeypatch.setattr(os, "link", refused)
    with pytest.raises(OSError, match=r"file system without hard links.*: choose a folder on"):
        storage.write_bytes(str(tmp_path / "owner.json"), b"first", if_absent=True)
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_asked_for_no_checksums_that_older_ones_refuse_but_checks_what_it_gets(
    s3_environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "PART_BYTES", 5 * 2**20)
    (tmp_path / "large").write_bytes(bytes(6 * 2**20))
    root, sent = f"s3://bucket/{uuid.uuid4().hex}", []

    def look(request: Any, **_: object) -> None:
        sent.append({name.lower(): value for name, value in request.headers.items()})

    events = storage._client().meta.events
    events.register("before-send.s3", look)
    storage.write_bytes(f"{root}/small", b"1")
    storage.copy_in(tmp_path / "large", f"{root}/large")
    assert storage.read_bytes(f"{root}/small") == b"1"
    events.unregister("before-send.s3", look)

    assert len(sent) == 6
    assert not any("checksum" in name for headers in sent for name in headers)
    digest = hashlib.sha256(b"1").hexdigest().encode()
    assert sent[0]["x-amz-content-sha256"] == digest  # and it is signed


def test_a_large_file_goes_in_parts_each_of_which_is_asked_again(
    faulty_store: Any, faulty_environment: dict[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """S3 takes 5 GB at once; a shard of a G model's checkpoint is larger."""
    for name, value in faulty_environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "PART_BYTES", 5 * 2**20)
    data = os.urandom(40 * 2**20 + 7)
    (tmp_path / "shard").write_bytes(data)
    before = faulty_store.seen["requests"]

    uri = f"s3://bucket/{uuid.uuid4().hex}/shard"
    storage.copy_in(tmp_path / "shard", uri)
    assert faulty_store.seen["requests"] - before >= 11
    storage.copy(uri, f"{uri}-2")

    assert storage.read_bytes(uri) == storage.read_bytes(f"{uri}-2") == data


def test_a_file_of_which_a_part_is_refused_leaves_no_parts_behind(
    s3_environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "PART_BYTES", 5 * 2**20)
    path = tmp_path / "shard"
    path.write_bytes(bytes(11 * 2**20))
    client, key = storage._client(), f"{uuid.uuid4().hex}/shard"

    def refused(**request: Any) -> None:
        raise PermissionError("a part was refused")

    monkeypatch.setattr(client, "upload_part", refused)
    with pytest.raises(PermissionError, match="a part was refused"):
        storage.copy_in(path, f"s3://bucket/{key}")
    assert not client.list_multipart_uploads(Bucket="bucket", Prefix=key).get("Uploads")
    assert not storage.exists(f"s3://bucket/{key}")


KILLED_WITH_PARTS_SENT = """
import os, sys
from pathlib import Path
from pipelines import storage
storage.PART_BYTES, storage.PARTS_AT_ONCE = 5 * 2**20, 1
client = storage._client()
send, sent = client.upload_part, []
def upload_part(**request):
    if sent:
        os.kill(os.getpid(), 9)
    sent.append(send(**request))
client.upload_part = upload_part
storage.copy_in(Path(sys.argv[1]), sys.argv[2])
"""


def test_parts_sent_by_a_killed_writer_go_with_the_folder_and_others_stay(
    s3_environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    root = uuid.uuid4().hex
    (tmp_path / "shard").write_bytes(bytes(11 * 2**20))
    line = [sys.executable, "-c", KILLED_WITH_PARTS_SENT, str(tmp_path / "shard")]
    killed = subprocess.run([*line, f"s3://bucket/{root}/out/data/shard"], check=False)
    assert killed.returncode == -9
    client = storage._client()
    for name in ("out-2/shard", "ou", "out"):
        client.create_multipart_upload(Bucket="bucket", Key=f"{root}/{name}")

    def left() -> list[str]:
        found = client.list_multipart_uploads(Bucket="bucket", Prefix=root).get("Uploads", ())
        return sorted(upload["Key"].removeprefix(f"{root}/") for upload in found)

    assert left() == ["ou", "out", "out-2/shard", "out/data/shard"]
    storage.end_uploads(f"s3://bucket/{root}/out/data")
    assert left() == ["ou", "out", "out-2/shard"]
    storage.delete(f"s3://bucket/{root}/out")
    assert left() == ["ou", "out-2/shard"]


@pytest.mark.parametrize("denial", [(403, "AccessDenied"), (501, "NotImplemented")])
def test_a_store_that_does_not_list_uploads_lets_files_be_deleted(
    denial: tuple[int, str], faulty_store: Any, faulty_environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    for name, value in faulty_environment.items():
        monkeypatch.setenv(name, value)
    faulty_store.slow_down = faulty_store.reset = faulty_store.truncate = 0
    faulty_store.denied, faulty_store.denial = "uploads", denial
    root = f"s3://bucket/{uuid.uuid4().hex}"
    storage.write_bytes(f"{root}/file", b"1")
    storage.delete(root)
    assert not storage.exists(root)
    assert re.search(rf"never finished may be left: {root}.*{denial[1]}", caplog.text)
    assert faulty_store.seen["requests"] < 10  # it was asked once


def test_expired_credentials_are_told_at_once_and_kept_to_ourselves(
    faulty_store: Any, faulty_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in faulty_environment.items():
        monkeypatch.setenv(name, value)
    faulty_store.code_after = (0, "ExpiredToken")
    with pytest.raises(PermissionError, match=r"credentials for s3://bucket/x have expired") as one:
        storage.read_bytes("s3://bucket/x")
    with pytest.raises(PermissionError) as two, storage.open_input("s3://bucket/x") as file:
        file.read()
    secret = faulty_environment["AWS_SECRET_ACCESS_KEY"]
    assert secret not in f"{one.value!r} {two.value!r}"
    assert faulty_store.seen["requests"] <= 4

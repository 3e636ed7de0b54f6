"""A URI is opened here: read, list, write, publish; local folders and S3 alike.

A URI is a plain path, file:///path or s3://bucket/key. What is written appears whole or not at
all: locally as a temporary file that is renamed, on S3 as a single PUT. Credentials, region and
endpoint come from the usual AWS environment and files, never from a URI.

Objects go through boto3, which knows conditional writes and says why a request failed; what
training reads of Parquet comes through pyarrow's file systems, by ranges. A store that is slow,
resets connections or cuts answers short is asked again, later and later with jitter, until a
deadline; one that refuses us is not.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import uuid
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import tenacity
from pyarrow import fs

if TYPE_CHECKING:
    from botocore.client import BaseClient

logger = logging.getLogger(__name__)
T = TypeVar("T")

S3 = "s3://"
ATTEMPTS = 30
"""Times that pyarrow asks for a range; it waits at most 20 s in between."""
DEADLINE_S = 180.0
"""How long a store may fail a request until we give up."""
DELETIONS = 16
PART_BYTES, PARTS_AT_ONCE, MOST_PARTS = 64 * 2**20, 4, 10_000
"""Of a file that is sent in parts."""
"""Objects that are deleted at once."""
NAMES = 2**16
"""Names of files that are handed out at once, of those that were sorted."""
PATIENT_TRIES = 4
"""Tries that go by without a word in the log."""
TEMPORARY = ".tmp-"
"""Start of the name of a file that is being written."""
NOTHING_THERE = "there is no file or folder at {uri}: mend the URI, or run the stage that writes it"

# What decides which S3 a client talks to, and as whom.
_ENVIRONMENT = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_PROFILE",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)


_REFUSALS = ("AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch",
             "InvalidToken", "TokenRefreshRequired")  # fmt: skip
_BUSY = ("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "InternalError",
         "ConditionalRequestConflict")  # fmt: skip


# Other tools take these in a URI; with us it would end in logs and manifests.
_OPTIONS = re.compile(
    r"[?&]((\w*_)?(access_key|secret_key|access_key_id|token|password)|endpoint_override|"
    r"Signature|AWSAccessKeyId|X-Amz-[\w-]+)=",
    re.IGNORECASE,
)
_ELSEWHERE = re.compile(r"\w+:/+|.*?://", re.DOTALL)
"""Start of a URI of another kind, and of one with a slash too few."""
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


class ShortRead(OSError):
    """A file has fewer bytes than it was said to have."""


class ObjectRefused(PermissionError):
    """The store refuses one object, such as one that is archived; perhaps not the others."""


class StoreFailed(OSError):
    """The store failed until the deadline, or in a way of its own: no fault of what it holds."""


class FileEntry(NamedTuple):
    """A file that was found in a folder."""

    uri: str
    relative: str
    """Its path below the folder, with forward slashes."""
    bytes: int
    changed: int = 0
    """When it was changed, in nanoseconds since 1970; 0 if that is not known."""


def join(uri: str, *parts: str) -> str:
    """A URI below another one; a file:// URI becomes a plain path, so that % means itself."""
    base = str(local_path(uri)) if uri.startswith("file://") else uri
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


def local_path(uri: str) -> Path | None:
    """Where a URI is on this machine; None for one that is elsewhere.

    Raises:
        ValueError: the URI is empty, of a kind that is not supported, or holds credentials.
    """
    if not uri:
        raise ValueError("an empty URI: expected a path, file:///path or s3://bucket/key")
    if uri.startswith("file://"):
        return Path(unquote(uri.removeprefix("file://")))
    if uri.startswith(S3):
        _bucket_key(uri)
        return None
    if elsewhere := _ELSEWHERE.match(uri):  # perhaps with a password: the rest stays unsaid
        raise ValueError(
            f"cannot open {elsewhere[0]}...: expected a path, file:///path or s3://bucket/key"
        )
    return Path(uri)


def absolute(uri: str) -> str:
    """The URI that means the same in every process of this machine, whatever its folder is.

    Raises:
        ValueError: the path is not UTF-8, as by the current folder; no file of ours could name it.
    """
    path = local_path(uri)
    found = uri.rstrip("/") if path is None else str(path.absolute())
    try:
        found.encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(found).decode("utf-8", "backslashreplace")
        raise ValueError(f"{shown} is not UTF-8: rename it, or link to it") from error
    return found


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """pyarrow's file system of a URI, and the path in it."""
    path = local_path(uri)
    if path is not None:
        return fs.LocalFileSystem(), str(path.absolute())
    bucket, key = _bucket_key(uri)
    return _s3_filesystem(_environment()), f"{bucket}/{key}"


def open_input(uri: str) -> pa.NativeFile:
    """A file to read by ranges.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it is a pipe, socket or device.
    """
    local = local_path(uri)
    if local is not None:
        _refuse_odd(local)
    system, path = filesystem(uri)
    with honest_errors(uri):
        return system.open_input_file(path)


@contextlib.contextmanager
def honest_errors(uri: str) -> Iterator[None]:
    """Turn the errors of a store that refuses us into a PermissionError that names the URI.

    For what reads a file that open_input opened: pyarrow has one kind of error for all.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError, StoreFailed):
        raise
    except OSError as error:
        if local_path(uri) is None:
            refusal = _refusal(uri)
            if refusal:
                raise refusal from error
        raise


def _refusal(uri: str) -> PermissionError | None:
    """Why the store refuses us, if it does; its answer to HEAD has no body that would say so."""
    try:
        read_bytes(uri, 0, 1)
    except PermissionError as error:
        return error
    except OSError:
        pass
    return None


def _refuse_odd(path: Path) -> os.stat_result:
    """The status of a file, which is no pipe, socket or device: to open one may wait for ever.

    Raises:
        OSError: it is one.
    """
    found = path.stat()
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise OSError(errno.EINVAL, "a pipe, socket or device, not a file", str(path))
    return found


class Version(NamedTuple):
    """What tells a file from a later one of the same name."""

    bytes: int
    mark: str
    """Its time of change, or S3's ETag."""


def version(uri: str) -> Version:
    """The version of a file.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it is a pipe, socket or device.
    """
    path = local_path(uri)
    if path is not None:
        found = _refuse_odd(path)
        return Version(found.st_size, str(found.st_mtime_ns))
    bucket, key = _bucket_key(uri)
    with honest_errors(uri):
        answer = _send(uri, lambda: _client().head_object(Bucket=bucket, Key=key))
    return Version(answer["ContentLength"], answer["ETag"])


class Ranges:
    """A file that many small ranges are read from; use it in a `with` block.

    Raises:
        FileNotFoundError: there is no such file.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.size = version(uri).bytes
        path = local_path(uri)
        self._file = None if path is None else os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)

    def read(self, first: int, length: int) -> bytes:
        """Bytes from `first` on: `length` of them, or what there is until the end."""
        length = max(min(length, self.size - first), 0)
        if self._file is None:
            return read_bytes(self.uri, first, length) if length else b""
        return os.pread(self._file, length, first)


class _RangeFile(io.RawIOBase):
    """A file on S3, read by ranges through boto3."""

    def __init__(self, uri: str) -> None:
        self._ranges, self._place = Ranges(uri), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + (0, self._place, self._ranges.size)[whence]
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        length = self._ranges.size if size is None or size < 0 else size
        found = self._ranges.read(self._place, length)
        self._place += len(found)
        return found


def open_patiently(uri: str) -> pa.NativeFile:
    """A file to read by ranges, asked for again until our deadline as all else is.

    open_input reads faster from S3, but pyarrow's own requests know no deadline, and give up where
    an answer was cut short.

    Raises:
        FileNotFoundError: there is no such file.
    """
    return open_input(uri) if local_path(uri) is not None else pa.PythonFile(_RangeFile(uri), "r")


def exists(uri: str) -> bool:
    """Whether there is a file, or a folder with something in it on S3."""
    path = local_path(uri)
    if path is not None:
        return path.exists()
    bucket, key = _bucket_key(uri)
    folder = _folder_key(uri)[1]
    with contextlib.suppress(FileNotFoundError):
        for prefix, wanted in ((key, key), (folder, folder)):
            request = {"Bucket": bucket, "MaxKeys": 1, "Prefix": prefix}
            answer = _send(uri, functools.partial(_client().list_objects_v2, **request))
            if any(k == wanted or wanted == folder for k, *_ in _page(answer)):
                return True
    return False


def read_bytes(uri: str, first: int = 0, length: int | None = None) -> bytes:
    """A file, or `length` bytes of it from byte `first` on.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it is a pipe, socket or device.
        ShortRead: it ended before `length` bytes were read.
    """
    path = local_path(uri)
    if path is not None:
        _refuse_odd(path)
        with path.open("rb") as file:
            file.seek(first)
            found = file.read(-1 if length is None else length)
    else:
        bucket, key = _bucket_key(uri)
        last = "" if length is None else first + length - 1
        extra = {"Range": f"bytes={first}-{last}"} if first or length is not None else {}
        get = functools.partial(_client().get_object, Bucket=bucket, Key=key, **extra)
        found = _send(uri, lambda: get()["Body"].read())
    if length is not None and len(found) != length:
        raise ShortRead(
            errno.ENODATA, f"short read, {len(found)} bytes at {first} instead of {length}", uri
        )
    return found


def read_json(uri: str) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it is none.
    """
    text = read_bytes(uri)
    try:
        return json.loads(text)
    except ValueError as error:  # of the encoding, too
        raise ValueError(
            f"{uri} is damaged, it is no JSON: {error}. Bring it back, or delete what it belongs to"
        ) from error


@contextlib.contextmanager
def staged(uri: str) -> Iterator[Path]:
    """A local temporary file to write; it becomes the file at `uri` when the block ends well."""
    target = local_path(uri)
    if target is None:
        with tempfile.TemporaryDirectory(prefix="jit-") as folder:
            path = Path(folder) / "file"
            yield path
            _upload(path, uri)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
    try:
        yield path
        _sync(path)
        path.replace(target)
    finally:
        path.unlink(missing_ok=True)


def write_bytes(uri: str, data: bytes, *, if_absent: bool = False) -> None:
    """Write a file, whole or not at all.

    Args:
        uri: the file.
        data: what it shall hold.
        if_absent: let one writer win: refuse to replace a file that holds something else.

    Raises:
        FileExistsError: with if_absent, the file exists and differs.
    """
    if not if_absent:
        with staged(uri) as temporary:
            temporary.write_bytes(data)
    elif not _create(uri, data) and read_bytes(uri) != data:
        # Equal bytes mean that our own write was repeated after its answer got lost.
        raise FileExistsError(errno.EEXIST, "another writer made it first", uri)


def write_json(uri: str, value: Any, *, if_absent: bool = False) -> None:
    """Write a value as JSON, indented, keys in the order given."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(uri, text.encode(), if_absent=if_absent)


def list_files(uri: str, *, suffixes: tuple[str, ...] | None = None) -> list[FileEntry]:
    """Files below a folder at any depth, sorted by their path (see walk).

    Args:
        uri: the folder.
        suffixes: endings to keep, in lower case; case does not matter.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    return [
        entry
        for entry in walk(uri)
        if suffixes is None or entry.relative.lower().endswith(suffixes)
    ]


def walk(uri: str) -> Iterator[FileEntry]:
    """Files below a folder at any depth, sorted by their path, of which few are held at a time.

    Only names are: those of one folder, and on S3 all. Links to folders are followed, each by its
    own name, as PyTorch's ImageFolder does; one that leads into a loop is not.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    path = local_path(uri)
    if path is not None:
        return _walk_local(path, uri, "", ())
    return (entry for entry in _listed(uri) if not entry.relative.endswith("/"))


def list_folder(uri: str) -> tuple[list[str], list[FileEntry]]:
    """Names of the folders, and the files, directly in a folder; both sorted.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folders, files = [], []
    for entry in scan(uri):
        if entry.relative.endswith("/"):
            folders.append(entry.relative[:-1])
        else:
            files.append(entry)
    if not folders and not files and local_path(uri) is None:
        raise _no_folder(uri)
    return sorted(folders, key=os.fsencode), files


def scan(uri: str) -> Iterator[FileEntry]:
    """What lies directly in a folder, sorted by name; only names are held. Folders end in /.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    path = local_path(uri)
    if path is None:
        yield from _listed(uri, Delimiter="/")
        return
    for _, packed in _in_order(_names(path, uri)):
        name = os.fsdecode(packed)
        is_folder = name.endswith("/")
        yield FileEntry(join(uri, name), name, 0) if is_folder else _entry(path / name, uri, name)


def delete(uri: str) -> None:
    """Remove a file, or a folder with all it holds; fine where there is neither."""
    path = local_path(uri)
    if path is not None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return
    bucket, key = _bucket_key(uri)
    keys = [key]
    for page in _pages(uri, Bucket=bucket, Prefix=f"{key.rstrip('/')}/"):
        keys += [found for found, *_ in _page(page)]
    requests = [functools.partial(_client().delete_object, Bucket=bucket, Key=k) for k in keys]
    with ThreadPoolExecutor(DELETIONS) as pool:  # one request for many is not known to every store
        for _ in pool.map(functools.partial(_send, uri), requests):
            pass
    end_uploads(uri)


def end_uploads(uri: str) -> None:
    """Discard the parts that a killed writer sent of files at or below a URI on S3.

    The store keeps them, and bills them, unseen. For whoever is the only writer there: an upload
    that still goes on ends, too. A store that does not let us look is left as it is.
    """
    if local_path(uri) is not None:
        return
    bucket, key = _bucket_key(uri)
    folder = f"{key.rstrip('/')}/"
    request = {"Bucket": bucket, "Prefix": key.rstrip("/")}
    try:
        while True:
            page = _send(uri, functools.partial(_client().list_multipart_uploads, **request))
            for found in page.get("Uploads", ()):
                if found["Key"] == key or found["Key"].startswith(folder):
                    which = {"Key": found["Key"], "UploadId": found["UploadId"]}
                    abort = functools.partial(_client().abort_multipart_upload, Bucket=bucket)
                    with contextlib.suppress(FileNotFoundError):  # it has just ended
                        _send(uri, functools.partial(abort, **which))
            if not page.get("IsTruncated") or "NextKeyMarker" not in page:
                return
            request["KeyMarker"] = page["NextKeyMarker"]
            request["UploadIdMarker"] = page.get("NextUploadIdMarker", "")
    except OSError as error:
        logger.warning("parts of files that were never finished may be left: %s", error)


def fetch(uri: str) -> Path:
    """A file or folder on this machine: itself, or a download that is made once and kept.

    Downloads are kept by URI and content under JIT_CACHE, by default ~/.cache/jit-on-ray.

    Raises:
        FileNotFoundError: there is nothing at the URI.
    """
    path = local_path(uri)
    if path is not None:
        if not path.exists():
            raise FileNotFoundError(NOTHING_THERE.format(uri=uri))
        return path.absolute()
    bucket, key = _bucket_key(uri)
    objects = []
    folder_key = _folder_key(uri)[1]
    for prefix in (key, folder_key):
        for page in _pages(uri, Bucket=bucket, Prefix=prefix):
            for item in page.get("Contents", ()):
                if item["Key"] == key or item["Key"].startswith(folder_key):
                    objects.append((item["Key"], item["ETag"], item["Size"]))
        if objects:
            break
    if not objects:
        raise FileNotFoundError(NOTHING_THERE.format(uri=uri))
    digest = hashlib.sha256(repr((uri, objects)).encode()).hexdigest()[:20]
    cache = cache_folder()
    target = cache / digest / Path(key).name
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=TEMPORARY) as folder:
        top = Path(folder) / digest
        for name, _, _ in objects:
            place = top / Path(key).name / name[len(key) :].strip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            download = functools.partial(_client().download_file, bucket, name, str(place))
            _send(uri, download)
        with contextlib.suppress(OSError):  # another process was quicker
            top.rename(cache / digest)
    return target


def cache_folder() -> Path:
    """Where downloads are kept."""
    return Path(os.environ.get("JIT_CACHE") or Path.home() / ".cache" / "jit-on-ray")


def copy(uri: str, target: str) -> None:
    """Copy an object to another place on S3, in the store."""
    from boto3.s3.transfer import TransferConfig

    source, there = (
        dict(zip(("Bucket", "Key"), _bucket_key(u), strict=True)) for u in (uri, target)
    )
    in_parts = TransferConfig(multipart_threshold=4 * 2**30, multipart_chunksize=2**30)
    _send(uri, lambda: _client().copy(source, **there, Config=in_parts))


def copy_in(path: Path, uri: str) -> None:
    """Copy a local file to a URI."""
    with staged(uri) as temporary:
        shutil.copyfile(path, temporary)


def move_in(path: Path, uri: str) -> None:
    """Move a local file to a URI; a rename where both are on one disk."""
    with staged(uri) as temporary:
        shutil.move(path, temporary)


def publish_folder(folder: Path, uri: str, *, last: str) -> None:
    """Copy a local folder to a URI; the file named `last` is the one that publishes the rest."""
    files = [entry.relative for entry in list_files(str(folder))]
    assert last in files, (last, files)
    for relative in [name for name in files if name != last] + [last]:
        copy_in(folder / relative, join(uri, relative))


def check_writable(uri: str) -> None:
    """Try to write below a folder that may not exist yet; leaves nothing behind.

    Raises:
        PermissionError: nothing can be written there.
        NotADirectoryError: there is a file where a folder must be.
    """
    path = local_path(uri)
    if path is None:
        probe = join(uri, f"{TEMPORARY}{uuid.uuid4().hex}")
        try:
            write_bytes(probe, b"")
            delete(probe)
        except OSError as error:
            raise PermissionError(f"cannot write to {uri}: {error}") from error
        return
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"cannot write to {uri}: {folder} is a file")
    try:
        Path(tempfile.mkdtemp(dir=folder, prefix=TEMPORARY)).rmdir()
    except OSError as error:
        raise PermissionError(
            f"cannot write to {uri}: {error.strerror} ({folder}). Choose a folder that this user "
            "may write to."
        ) from error


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _create(uri: str, data: bytes) -> bool:
    """Write a file that must not exist yet; whether it did not."""
    target = local_path(uri)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            temporary.write_bytes(data)
            _sync(temporary)
            target.hardlink_to(temporary)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise PermissionError(
                    f"{target.parent} is on a file system without hard links, by which one writer "
                    "is told from another: choose a folder on a disk that has them, or on S3"
                ) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)
        return True
    bucket, key = _bucket_key(uri)
    put = functools.partial(_client().put_object, Bucket=bucket, Key=key, Body=data)
    try:
        _send(uri, lambda: put(IfNoneMatch="*"))
    except FileExistsError:
        return False
    return True


def _upload(path: Path, uri: str) -> None:
    """Send a file to S3, which takes no more than 5 GB at once: a large one goes in parts."""
    bucket, key = _bucket_key(uri)
    client, size = _client(), path.stat().st_size

    def put() -> None:
        with path.open("rb") as body:
            client.put_object(Bucket=bucket, Key=key, Body=body)

    if size <= PART_BYTES:
        _send(uri, put)
        return
    request = functools.partial(client.create_multipart_upload, Bucket=bucket, Key=key)
    whole = {"Bucket": bucket, "Key": key, "UploadId": _send(uri, request)["UploadId"]}
    length = max(PART_BYTES, -(-size // MOST_PARTS))

    def send(number: int) -> dict[str, Any]:
        with path.open("rb") as file:
            file.seek((number - 1) * length)
            piece = {"PartNumber": number, "Body": file.read(length)}
        answer = _send(uri, functools.partial(client.upload_part, **whole, **piece))
        return {"PartNumber": number, "ETag": answer["ETag"]}

    try:
        with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
            parts = list(pool.map(send, range(1, -(-size // length) + 1)))
        end = functools.partial(client.complete_multipart_upload, **whole)
        try:
            _send(uri, functools.partial(end, MultipartUpload={"Parts": parts}))
        except FileNotFoundError:  # it was ended already, and that answer got lost
            head = functools.partial(client.head_object, Bucket=bucket, Key=key)
            if _send(uri, head)["ContentLength"] != size:
                raise
    except BaseException:
        with contextlib.suppress(OSError):  # what was sent would be stored, and paid, unseen
            _send(uri, functools.partial(client.abort_multipart_upload, **whole))
        raise


def _entry(path: Path, uri: str, relative: str) -> FileEntry:
    try:
        found = path.stat()
    except OSError:  # a link to nothing: whoever reads it says so
        return FileEntry(join(uri, relative), relative, 0)
    return FileEntry(join(uri, relative), relative, found.st_size, found.st_mtime_ns)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _no_folder(uri: str) -> FileNotFoundError:
    return FileNotFoundError(f"no folder at {uri}: check the path, or what it is mounted from")


def _names(path: Path, uri: str) -> Iterator[bytes]:
    """Names in a local folder; those of folders end in /, so that they sort as their files will."""
    if not path.exists():
        raise _no_folder(uri)
    if not path.is_dir():
        raise NotADirectoryError(f"{uri} is a file, not a folder")
    with os.scandir(path) as entries:
        for entry in entries:
            yield os.fsencode(f"{entry.name}/" if _is_folder(entry) else entry.name)


def _listed(uri: str, **request: str) -> Iterator[FileEntry]:
    """Objects below a folder on S3, and with a delimiter what is common to some, sorted."""
    bucket, prefix = _folder_key(uri)
    sizes, changes = array("q"), array("q")

    def names() -> Iterator[bytes]:
        for page in _pages(uri, Bucket=bucket, Prefix=prefix, **request):
            common = [(found["Prefix"], 0, 0) for found in page.get("CommonPrefixes", ())]
            for key, size, changed in common + _page(page):
                sizes.append(size)
                changes.append(changed)
                yield key[len(prefix) :].encode()

    for i, name in _in_order(names()):  # not every store sorts as S3 does
        relative = name.decode()
        if relative:
            yield FileEntry(f"{S3}{bucket}/{prefix}{relative}", relative, sizes[i], changes[i])
    if not sizes:
        raise _no_folder(uri)


def _walk_local(
    folder: Path, uri: str, relative: str, above: tuple[str, ...]
) -> Iterator[FileEntry]:
    """Files of a folder, which lies at `relative`, inside of the folders `above` (real paths)."""
    real = os.path.realpath(folder)
    if any(f"{outer}/".startswith(f"{real.rstrip('/')}/") for outer in above):
        return
    for _, packed in _in_order(_names(folder, join(uri, relative) if relative else uri)):
        name = os.fsdecode(packed)
        if name.endswith("/"):
            yield from _walk_local(folder / name, uri, f"{relative}{name}", (*above, real))
        else:
            yield _entry(folder / name, uri, f"{relative}{name}")


def _in_order(names: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Names in their order, each with the place that it had; bare bytes, for they may be many."""
    text, ends = bytearray(), array("q", [0])
    for name in names:
        text += name
        ends.append(len(text))
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(text)]
    packed = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(ends) - 1, buffers)
    order = pc.sort_indices(packed)
    for first in range(0, len(order), NAMES):
        some = order.slice(first, NAMES)
        yield from zip(some.to_pylist(), packed.take(some).to_pylist(), strict=True)


def _bucket_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix(S3).partition("/")
    if not _BUCKET.fullmatch(bucket) or _OPTIONS.search(uri):  # not all of it goes into a log
        shown = bucket if _BUCKET.fullmatch(bucket) else "..."
        raise ValueError(
            f"{S3}{shown} is not s3://bucket/key; credentials and endpoint belong in the "
            "environment or ~/.aws"
        )
    return bucket, key


def _folder_key(uri: str) -> tuple[str, str]:
    bucket, key = _bucket_key(uri)
    return bucket, f"{key.rstrip('/')}/" if key.strip("/") else ""


def _environment() -> tuple[str | None, ...]:
    return tuple(os.environ.get(name) for name in _ENVIRONMENT)


def _client() -> BaseClient:
    return _s3_client(_environment())


@functools.lru_cache(maxsize=4)
def _s3_client(environment: tuple[str | None, ...]) -> BaseClient:
    import boto3
    from botocore.config import Config

    logging.getLogger("botocore").setLevel(logging.WARNING)
    session = boto3.Session()
    config = Config(
        retries={"total_max_attempts": 1},  # _send tries again
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=32,
        # By default botocore adds and asks for CRCs, which older stores refuse. Without them it
        # signs a digest of what it sends; what we read has our own lengths and digests.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    region = session.region_name or "us-east-1"
    client = session.client("s3", region_name=region, config=config)
    endpoint = _endpoint(client)
    if endpoint is None:
        return client
    if "@" in urlsplit(endpoint).netloc:
        raise ValueError(
            "the endpoint of the S3 store holds a password: credentials belong in "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws"
        )
    # Names of other stores than Amazon's seldom resolve with the bucket in front.
    config = config.merge(Config(s3={"addressing_style": "path"}))
    return session.client("s3", region_name=region, config=config)


def _endpoint(client: BaseClient) -> str | None:
    """Where another store than Amazon's is, by the environment or ~/.aws/config."""
    host = urlsplit(client.meta.endpoint_url).hostname or ""
    is_amazon = re.fullmatch(r"s3[a-z0-9.-]*\.amazonaws\.com(\.cn)?", host)
    return None if is_amazon else client.meta.endpoint_url


@functools.lru_cache(maxsize=4)
def _s3_filesystem(environment: tuple[str | None, ...]) -> fs.S3FileSystem:
    return fs.S3FileSystem(
        endpoint_override=_endpoint(_s3_client(environment)),
        region=_s3_client(environment).meta.region_name,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        connect_timeout=10,
        request_timeout=60,
    )


def _pages(uri: str, **request: str) -> Iterator[dict[str, Any]]:
    while True:
        page = _send(uri, functools.partial(_client().list_objects_v2, **request))
        yield page
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def _page(page: dict[str, Any]) -> list[tuple[str, int, int]]:
    """Keys, their bytes, and when they were changed, in nanoseconds."""
    return [
        (item["Key"], item["Size"], int(item["LastModified"].timestamp() * 1000) * 10**6)
        for item in page.get("Contents", ())
    ]


def _send(uri: str, request: Callable[[], T]) -> T:
    """The answer to a request, asked again while the store is busy or broken.

    Raises:
        OSError: as for a local file, naming the URI.
    """
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_may_pass),
        wait=tenacity.wait_random_exponential(multiplier=0.1, max=20),
        stop=tenacity.stop_after_delay(DEADLINE_S),
        before_sleep=functools.partial(_note, uri),
        reraise=True,
    )
    with _errors(uri):
        return retrying(request)


def _note(uri: str, state: tenacity.RetryCallState) -> None:
    if state.attempt_number == PATIENT_TRIES and state.outcome is not None:
        error = state.outcome.exception()
        logger.warning("%s: trying again for %.0f s after %s", uri, DEADLINE_S, error)


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    from boto3.exceptions import Boto3Error
    from botocore import exceptions as e

    if isinstance(error, e.ClientError):
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        passing = status >= 500 and status != 501  # 501 is what it does not know how to do
        return passing or status == 429 or error.response["Error"]["Code"] in _BUSY
    broken = (e.HTTPClientError, e.IncompleteReadError, e.ResponseStreamingError, Boto3Error,
              e.ConnectionError, e.CredentialRetrievalError)  # fmt: skip
    return isinstance(error, broken) or (
        isinstance(error, OSError) and error.errno in (errno.ECONNRESET, errno.EPIPE)
    )


def _refused(uri: str, code: str) -> PermissionError:
    if code in ("ExpiredToken", "TokenRefreshRequired"):
        return PermissionError(
            f"the credentials for {uri} have expired ({code}): renew them and run the same command "
            "again"
        )
    kind = ObjectRefused if code in ("AccessDenied", "InvalidObjectState") else PermissionError
    return kind(
        f"{uri}: the store refuses the credentials ({code}): check AWS_ACCESS_KEY_ID, AWS_PROFILE "
        "or the role, and the bucket's policy"
        if code != "InvalidObjectState"
        else f"{uri} is archived ({code}): restore it"
    )


@contextlib.contextmanager
def _errors(uri: str) -> Iterator[None]:
    """Turn the errors of S3 into those that a local file would give, naming the URI."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        yield
    except NoCredentialsError as error:
        raise PermissionError(
            f"no AWS credentials for {uri}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE, or a role"
        ) from error
    except ClientError as error:
        code = error.response["Error"]["Code"]
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        message = f"{uri}: {error.response['Error'].get('Message', code)} ({code})"
        if status in (401, 403) or code in _REFUSALS:
            raise _refused(uri, code) from error
        if status == 404:
            raise FileNotFoundError(
                errno.ENOENT, f"no such file or bucket ({code})", uri
            ) from error
        if status == 416:
            raise ShortRead(errno.ENODATA, "it ends before the range", uri) from error
        if status in (409, 412):
            raise FileExistsError(message) from error
        raise (StoreFailed if _may_pass(error) else OSError)(message) from error
    except (BotoCoreError, Boto3Error) as error:
        raise StoreFailed(f"{uri}: {error}") from error

"""Checkpoints of a run: `checkpoints/step_00012500/`, to continue from and to export.

We write them ourselves instead of handing them to Ray Train: its list of checkpoints is tied to
the Ray version, cannot say that a folder is whole, and a plain process could not read or write
it. So a run is continued in the same way under Ray, without Ray, and by another Ray.

A checkpoint exists once its `meta.json` does, which is written when every other file is stored and
lists their sizes. Each rank stores its own shard (torch.distributed.checkpoint), and when loading
reads only the byte ranges it needs, so any number of ranks may continue. `latest.json` follows,
for people and scripts; we ourselves look for the newest complete folder, so that a kill between
the two loses nothing.
"""

from __future__ import annotations

import io
import logging
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from jitmodel.config import ClassInfo, Config
from pipelines import storage
from pipelines.config import TrainConfig
from pipelines.shards import Manifest

logger = logging.getLogger(__name__)

META, LATEST, FOLDER = "meta.json", "latest.json", "checkpoints"


class Meta(Config):
    """What meta.json holds."""

    format_version: Literal[1] = 1
    run: str
    """Name of the run."""
    images_seen: int
    """The clock; with seed, data and lanes it is also the position in the data."""
    identity: dict[str, Any]
    """What must not change in a run, by option; see `identity`."""
    config: dict[str, Any]
    """The full config of the process that wrote the checkpoint."""
    data: str
    """Fingerprint of the dataset."""
    classes: tuple[ClassInfo, ...]
    """Classes of the dataset, by label."""
    world_size: int
    """Processes that wrote it."""
    losses: tuple[float, ...] = ()
    """Losses of the steps since the last line of metrics.jsonl, which the next line averages."""
    files: dict[str, int]
    """Every other file of the folder, with its bytes."""
    versions: dict[str, str]
    """Tools that wrote it."""


class Checkpoint(NamedTuple):
    """A complete checkpoint."""

    uri: str
    meta: Meta


class Stateful(Protocol):
    """What is saved: jitmodel.state.TrainState."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def identity(config: TrainConfig, manifest: Manifest) -> dict[str, Any]:
    """What a run may not change between its first and its last image, as option -> value.

    Workers, micro-batch, precision and everything about logs may change. The length may too,
    unless the schedule depends on it.
    """
    chosen = config.model_dump(
        mode="json",
        include={
            "model": True,
            "flow": True,
            "optimizer": True,
            "loader": {"lanes", "window"},
            "seed": True,
            "global_batch": True,
            "flip": True,
        },
    )
    if config.optimizer.schedule != "constant":
        chosen["total_images"] = config.total_images
    return {**flat(chosen), "data (fingerprint)": manifest.fingerprint}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    result: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value
    return result


def check_same(found: Checkpoint, wanted: dict[str, Any]) -> None:
    """Refuse to continue a run as another one.

    Raises:
        ValueError: naming every option that differs, with both values.
    """
    there = found.meta.identity
    differing = [
        f"{name} is {there.get(name)!r} there and {wanted.get(name)!r} here"
        for name in sorted(there.keys() | wanted.keys())
        if there.get(name) != wanted.get(name)
    ]
    if differing:
        raise ValueError(
            f"cannot continue the run at {found.uri} ({found.meta.images_seen} images seen): "
            f"{'; '.join(differing)}. Repeat the options of the first start to continue, choose "
            "another --name, or add --fresh to start over beside the old run."
        )


def newest(run: str) -> Checkpoint | None:
    """The newest complete checkpoint of a run folder; None if there is none."""
    for folder, files in sorted(_folders(run).items(), reverse=True):
        uri = storage.join(run, FOLDER, folder)
        if META not in files:
            logger.warning("%s is incomplete (no %s): skipped", uri, META)
            continue
        try:
            return _checked(uri, files)
        except ValueError as error:
            logger.warning("%s: skipped", error)
    return None


def _checked(uri: str, files: Mapping[str, int]) -> Checkpoint:
    """The checkpoint of a folder that holds `files` (name -> bytes).

    Raises:
        ValueError: meta.json is none, or another file is missing or cut short.
    """
    try:
        meta = Meta.model_validate(storage.read_json(storage.join(uri, META)))
    except ValueError as error:
        raise ValueError(
            f"the checkpoint {uri} is damaged ({META}: {str(error).splitlines()[0]})"
        ) from error
    wrong = [name for name, size in meta.files.items() if files.get(name) != size]
    if wrong:
        raise ValueError(f"the checkpoint {uri} is damaged ({wrong[0]} missing or cut short)")
    return Checkpoint(uri, meta)


def find(uri: str) -> Checkpoint:
    """The checkpoint at a URI, or the newest one of the run at it.

    Raises:
        FileNotFoundError: there is no complete checkpoint.
        ValueError: the one that was named is damaged.
    """
    if storage.exists(storage.join(uri, META)):
        return _checked(uri, {f.relative: f.bytes for f in storage.list_files(uri)})
    found = newest(uri)
    if found is None:
        raise FileNotFoundError(
            f"no complete checkpoint at {uri}: neither {uri}/{META} nor a folder with one below "
            f"{uri}/{FOLDER}. Name a run folder that `jit train` wrote, or one of its checkpoints."
        )
    return found


def save(
    run: str, step: int, state: Stateful, meta: Meta, *, rank: int, world_size: int, keep: int
) -> str:
    """Store a checkpoint of the run; every rank calls it.

    Args:
        run: URI of the run folder.
        step: number that names the folder.
        state: what is stored.
        meta: `files` is filled in here.
        rank: number of this process.
        world_size: number of processes.
        keep: newest checkpoints that stay; older ones are deleted.

    Returns:
        URI of the checkpoint.
    """
    uri = storage.join(run, FOLDER, f"step_{step:08d}")
    if rank == 0:
        _delete(uri)  # what an interrupted save of the same step may have left
    local = Path(tempfile.mkdtemp(prefix="jit-save-"))
    try:
        with _quiet():
            writer = FileSystemWriter(local)
            dcp_save(state.state_dict(), storage_writer=writer, no_dist=world_size == 1)
        files = {path.name: path.stat().st_size for path in sorted(local.iterdir())}
        if files:
            storage.publish_folder(local, uri, last=max(files))
    finally:
        shutil.rmtree(local, ignore_errors=True)
    gathered: list[Any] = [files]
    if world_size > 1:
        gathered = [None] * world_size
        dist.all_gather_object(gathered, files)
    if rank == 0:
        everything = {name: size for part in gathered for name, size in part.items()}
        meta = meta.model_copy(update={"files": everything})
        storage.write_json(storage.join(uri, META), meta.model_dump(mode="json"))
        latest = {"checkpoint": f"{FOLDER}/step_{step:08d}", "images_seen": meta.images_seen}
        storage.write_json(storage.join(run, LATEST), latest)
        for old in sorted(_folders(run))[:-keep]:
            _delete(storage.join(run, FOLDER, old))
    return uri


def load(uri: str, state: Stateful) -> None:
    """Continue `state` from a checkpoint, at any number of processes; every rank calls it."""
    target = state.state_dict()
    with _quiet():
        dcp_load(target, storage_reader=Reader(uri), no_dist=not dist.is_initialized())
    state.load_state_dict(target)


def _folders(run: str) -> dict[str, dict[str, int]]:
    """Checkpoint folders of a run, complete or not: name -> file -> bytes."""
    folders: dict[str, dict[str, int]] = {}
    with suppress(FileNotFoundError):
        for entry in storage.list_files(storage.join(run, FOLDER)):
            folder, _, file = entry.relative.partition("/")
            folders.setdefault(folder, {})[file] = entry.bytes
    return folders


def _delete(uri: str) -> None:
    """Delete a checkpoint, meta.json first, so that it never looks whole."""
    if storage.exists(storage.join(uri, META)):
        storage.delete(storage.join(uri, META))
    storage.delete(uri)


def read(uri: str, prefix: str) -> dict[str, Tensor]:
    """Whole tensors of a checkpoint whose dotted name starts with a prefix, and no others.

    Needs one process and no process group. Names are given without the prefix.
    """
    found = Reader(uri).read_metadata().state_dict_metadata
    wanted = {
        name: torch.empty(info.size, dtype=info.properties.dtype)
        for name, info in found.items()
        if name.startswith(prefix) and isinstance(info, TensorStorageMetadata)
    }
    with _quiet():
        dcp_load(dict[str, Any](wanted), storage_reader=Reader(uri), no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in wanted.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that one process is one process, which is what no_dist asks for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


class _Uris:
    """The part of torch's FileSystem that a reader uses, over storage."""

    @contextmanager
    def create_stream(self, path: str, mode: str) -> Iterator[IO[bytes]]:
        assert mode == "rb"
        with storage.open_input(path) as file:
            yield file

    def concat_path(self, path: str, suffix: str) -> str:
        return storage.join(path, suffix)


class Reader(FileSystemReader):
    """torch.distributed.checkpoint from a URI, by byte ranges, without executing its pickle."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.fs: Any = _Uris()
        self.path: Any = uri

    def _slice_file(self, file: IO[bytes], info: Any) -> IO[bytes]:
        file.seek(info.offset)
        return io.BytesIO(file.read(info.length))  # one request, where torch.load makes many

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with storage.open_input(storage.join(self.path, ".metadata")) as file:
            found: Metadata = _MetadataUnpickler(io.BytesIO(file.read())).load()
        if found.storage_meta is not None:
            found.storage_meta.load_id = self.load_id
        return found


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the plain types that torch puts into .metadata, and nothing that could act."""

    ALLOWED = frozenset(
        [
            ("pathlib", "PosixPath"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ]
        + [
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ]
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise ValueError(
            f"the checkpoint's .metadata names {module}.{name}, which no checkpoint of ours does: "
            "it is damaged or was tampered with"
        )

"""Checkpoints of a run: `checkpoints/step_00012500/`, to continue from and to export.

We write them ourselves instead of handing them to Ray Train: its list of checkpoints is tied to
the Ray version, cannot say that a folder is whole, and a plain process could not read or write
it. So a run is continued in the same way under Ray, without Ray, and by another Ray.

A checkpoint exists once its `meta.json` does, which is written when every other file is stored and
lists their sizes. Each rank stores its own shard (torch.distributed.checkpoint), and when loading
reads only the byte ranges it needs, so any number of ranks may continue. `latest.json` follows,
for people and scripts; we ourselves look for the newest complete folder, so that a kill between
the two loses nothing. After the first checkpoint comes `first.json`, which stays: a run that lost
its checkpoints is not begun again at image 0 without being asked to.

Training waits only while the state is copied into host memory (`Saver.start`); a thread of each
rank stores the copy. A kill can meet a save at these points, and then the newest complete
checkpoint is

1. while the state is copied, or a shard is written: the one before;
2. when some shards are stored, or all but .metadata: the one before;
3. when all is stored but meta.json: the one before;
4. when meta.json is stored, latest.json is not: the new one;
5. when latest.json is stored, and first.json is not, or of an old checkpoint that goes nothing,
   its meta.json, or some of its shards are deleted: the new one.

Whatever an interrupted save or deletion left is removed by the next save.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import pickle
import re
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
import yaml
from pydantic import ValidationError
from torch import Tensor
from torch.distributed._state_dict_utils import _copy_state_dict, _create_cpu_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from jitmodel.config import ClassInfo, Config
from pipelines import storage
from pipelines.config import StageFailed, TrainConfig
from pipelines.shards import Manifest

logger = logging.getLogger(__name__)

META, LATEST, FOLDER = "meta.json", "latest.json", "checkpoints"
FIRST = "first.json"
"""The first complete checkpoint, in the words of latest.json; that it is there says that the run
had one. Runs of earlier versions have none until their next checkpoint."""
VALIDATIONS = "validations"
"""Scores of a run's checkpoints."""
CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
"""Config of a run, written when it begins."""
NOT_ANOTHER = (
    "Repeat the options of the first start to continue, choose another --name, or add --fresh to "
    "start over beside the old run."
)
STEP = re.compile(r"step_(\d{8,})")
"""Name of a checkpoint's folder."""
LEAVE_S = 20.0
"""Longest wait for a save in work when the process ends by an error."""

NICENESS = 10
"""Of the thread that stores."""
LEAST_FREE = 16 * 2**20
"""A disk with less room than this, in bytes, is full."""


class SaveFailed(StageFailed):
    """A checkpoint could not be stored; the ones before it are whole."""


class OtherFormat(ValueError):
    """A checkpoint is whole, but of a later version of this package."""


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
    levels: tuple[tuple[float, ...], ...] = ()
    """The same by noise level: sum and number of the losses in each bin of t."""
    skipped: tuple[int, ...] = ()
    """Places of the run at which a batch begins that was left out, as its loss was no number."""
    files: dict[str, int]
    """Every other file of the folder, with its bytes."""
    versions: dict[str, str]
    """Tools that wrote it."""


class Latest(Config):
    """What latest.json holds."""

    format_version: Literal[1] = 1
    checkpoint: str
    """Of the newest complete checkpoint, below the run folder."""
    images_seen: int


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
    differing = _differing(found.meta.identity, wanted)
    if differing:
        raise ValueError(
            f"cannot continue the run at {found.uri} ({found.meta.images_seen} images seen): "
            f"{differing}. {NOT_ANOTHER}"
        )


def _differing(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{name} is {there.get(name)!r} there and {wanted.get(name)!r} here"
        for name in sorted(there.keys() | wanted.keys())
        if there.get(name) != wanted.get(name)
    )


def check_never_saved(run: str, wanted: dict[str, Any]) -> None:
    """Refuse to begin at image 0 in the folder of a run that was further, or is another one.

    Raises:
        FileNotFoundError: latest.json names a checkpoint, or first.json, a score or metrics.jsonl
            tells of one, but none is complete.
        ValueError: every checkpoint is damaged; or a run was begun there with other options, or
            with some that cannot be read, and has saved nothing yet.
    """
    uri = storage.join(run, LATEST)
    if storage.exists(uri):
        try:
            latest = Latest.model_validate(storage.read_json(uri))
        except ValueError as error:
            raise ValueError(
                f"{uri} is damaged, and no checkpoint below {run}/{FOLDER} is complete: bring them "
                "back, choose another --name, or add --fresh to start over beside the old run."
            ) from error
        raise FileNotFoundError(
            f"{uri} names {latest.checkpoint} ({latest.images_seen} images seen), but no "
            f"checkpoint below {run}/{FOLDER} is complete: bring it back, choose another --name, "
            "or add --fresh to start over beside the old run."
        )
    damaged = list(complete(run).values())
    if damaged:
        raise ValueError(
            f"every checkpoint below {run}/{FOLDER} is damaged, the newest at {damaged[-1]}: bring "
            "one back, choose another --name, or add --fresh to start over beside the old run."
        )
    for uri in (storage.join(run, FIRST), storage.join(run, VALIDATIONS)):
        if storage.exists(uri):  # written only when a checkpoint was complete
            raise FileNotFoundError(
                f"{uri} tells that checkpoints were stored, but none below {run}/{FOLDER} is "
                "complete: bring them back, choose another --name, or add --fresh to start over "
                "beside the old run."
            )
    begun = storage.join(run, CONFIG)
    if not storage.exists(begun):
        return
    there = flat(_read_config(begun).model_dump(mode="json"))
    told = told_images(run)
    # The line of a step comes before its save, and one save may still be in work when the next is
    # due: a run without a complete checkpoint may be as far as that, and begins again.
    if told > 2 * there["checkpoint_every_images"]:
        raise FileNotFoundError(
            f"{storage.join(run, METRICS)} tells of {told} images, but no checkpoint is below "
            f"{run}/{FOLDER}: bring them back, choose another --name, or add --fresh to start over "
            "beside the old run."
        )
    chosen = {name: value for name, value in wanted.items() if name in there}
    differing = _differing({name: there[name] for name in chosen}, chosen)
    if differing:
        raise ValueError(
            f"cannot begin at {run}: a run was begun there that has saved nothing yet, and "
            f"{differing}. {NOT_ANOTHER}"
        )


def _read_config(uri: str) -> TrainConfig:
    """The config that a run began with.

    Raises:
        ValueError: it is none, or damaged.
    """
    try:
        return TrainConfig.model_validate(yaml.safe_load(storage.read_bytes(uri)))
    except ValidationError as error:
        first = error.errors()[0]
        why = f"{'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}"
    except (ValueError, yaml.YAMLError) as error:
        why = _cause(error)
    raise ValueError(
        f"{uri} is not the config of a run that this version reads ({why}): bring the run's own "
        "back, choose another --name, or add --fresh to start over beside what is there."
    )


def told_images(run: str) -> int:
    """Images seen at the last line of metrics.jsonl that can be read; 0 if there is none."""
    lines = metrics_lines(run)
    return lines[-1][0] if lines else 0


def metrics_lines(run: str) -> list[tuple[int, bytes]]:
    """Lines of metrics.jsonl, each after its images_seen.

    Those that cannot be read are left out: a machine that lost its power, or a full disk, leaves
    them, and no run may end by what only tells of it.
    """
    uri, found, unread = storage.join(run, METRICS), [], 0
    if not storage.exists(uri):
        return []
    lines = storage.read_bytes(uri).splitlines(keepends=True)
    for line in (line for line in lines if line.endswith(b"\n")):  # a kill may cut the last one
        try:
            found.append((int(json.loads(line)["images_seen"]), line))
        except (ValueError, KeyError, TypeError):
            unread += 1
    if unread:
        logger.warning("%s: %d damaged lines are left out", uri, unread)
    return found


def newest(run: str) -> Checkpoint | None:
    """The newest complete checkpoint of a run folder; None if there is none.

    Raises:
        OtherFormat: it is of a later version of this package.
    """
    for folder, files in sorted(_folders(run).items(), reverse=True):
        uri = storage.join(run, FOLDER, folder)
        if META not in files:
            logger.warning("%s is incomplete (no %s): skipped", uri, META)
            continue
        try:
            return _checked(uri, files)
        except OtherFormat:  # an older checkpoint is no way to go on
            raise
        except ValueError as error:
            logger.warning("%s: skipped", error)
    return None


def latest_images(run: str) -> int:
    """Images seen by the newest checkpoint, as latest.json tells; 0 before the first."""
    try:
        return Latest.model_validate(storage.read_json(storage.join(run, LATEST))).images_seen
    except (OSError, ValueError):
        return 0


def complete(run: str) -> dict[int, str]:
    """URIs of the checkpoints of a run that were stored whole, by step, oldest first."""
    return {
        int(folder.removeprefix("step_")): storage.join(run, FOLDER, folder)
        for folder, files in sorted(_folders(run).items())
        if META in files
    }


def _checked(uri: str, files: Mapping[str, int]) -> Checkpoint:
    """The checkpoint of a folder that holds `files` (name -> bytes).

    Raises:
        OtherFormat: it is of a later version of this package.
        ValueError: meta.json is none, or another file is missing or cut short.
    """
    content: Any = None
    try:
        content = storage.read_json(storage.join(uri, META))
        meta = Meta.model_validate(content)
    except ValueError as error:
        here = Meta.model_fields["format_version"].default
        match content:
            case {"format_version": int(there)} if there > here:
                raise OtherFormat(
                    f"the checkpoint {uri} has format_version {there}, and this jit-on-ray reads "
                    f"{here}: upgrade it to the version that wrote the checkpoint, or a later one."
                ) from error
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
        ValueError: the one that was named is damaged, or one is of a later version.
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
    run: str,
    step: int,
    state: dict[str, Any],
    meta: Meta,
    *,
    rank: int,
    world_size: int,
    keep: Callable[[list[int]], set[int]],
    check: Callable[[], None],
    group: dist.ProcessGroup | None = None,
    before: Callable[[], None] | None = None,
) -> str:
    """Store a checkpoint of the run; every rank calls it.

    Args:
        run: URI of the run folder.
        step: number that names the folder.
        state: a state dict that nobody changes meanwhile.
        meta: `files` is filled in here.
        rank: number of this process.
        world_size: number of processes.
        keep: which of the complete steps stay; the others are deleted.
        check: raises if the run is not this one's to write any more; rank 0 asks.
        group: processes that talk to each other here; all by default.
        before: what rank 0 does before the checkpoint becomes valid.

    Returns:
        URI of the checkpoint.

    Raises:
        SaveFailed: on every rank, with what failed on any of them.
    """
    uri = storage.join(run, FOLDER, f"step_{step:08d}")
    files: dict[str, int] = {}
    trouble = ""
    try:
        if rank == 0:
            check()
            _delete(uri)  # what an interrupted save of the same step may have left
        files = _store_shards(uri, _scratch(run, rank), state, group, alone=world_size == 1)
        if rank == 0 and before:
            before()
    except Exception as error:  # whatever it is, the other ranks wait to be told
        trouble = _cause(error)
    everything = _gathered((files, trouble), world_size, group)
    troubles = [text for _, text in everything if text]
    if rank == 0 and not troubles:
        sizes = {name: size for part, _ in everything for name, size in part.items()}
        try:
            check()
            _publish(run, step, meta.model_copy(update={"files": sizes}), keep)
        except Exception as error:
            trouble = _cause(error)
    published = [text for _, text in _gathered((None, trouble), world_size, group) if text]
    if troubles or published:
        raise SaveFailed(
            f"the checkpoint at image {meta.images_seen} could not be stored at {uri}: "
            f"{(troubles or published)[0]}. Checkpoints from before are whole: mend the storage, "
            "and the same line again goes on from the newest of them."
        )
    return uri


def _scratch(run: str, rank: int) -> Path:
    """An empty local folder for what a rank writes: beside the run, where a rename stores it."""
    here = storage.local_path(run)
    if here is None:
        return Path(tempfile.mkdtemp(prefix="jit-save-"))
    folder = here / f".saving-{rank}"
    shutil.rmtree(folder, ignore_errors=True)  # of a save that was killed
    folder.mkdir(parents=True)
    return folder


def _store_shards(
    uri: str, scratch: Path, state: dict[str, Any], group: dist.ProcessGroup | None, *, alone: bool
) -> dict[str, int]:
    """Store this rank's part of a state, .metadata last; its files and their bytes."""
    try:
        with _quiet():
            writer = FileSystemWriter(scratch)
            try:
                dcp_save(state, storage_writer=writer, process_group=group, no_dist=alone)
            except CheckpointException as error:  # torch hides what the disk said
                if shutil.disk_usage(scratch).free < LEAST_FREE:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(scratch)) from error
                first = next(iter(error.failures.values()))[0]
                raise OSError(f"{first} (is the disk full that holds {scratch}?)") from error
        files = {path.name: path.stat().st_size for path in sorted(scratch.iterdir())}
        for name in sorted(files, reverse=True):
            storage.move_in(scratch / name, storage.join(uri, name))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return files


def _publish(run: str, step: int, meta: Meta, keep: Callable[[list[int]], set[int]]) -> None:
    """Make a stored checkpoint valid, say so in latest.json, and delete what need not stay."""
    name = f"step_{step:08d}"
    storage.write_json(storage.join(run, FOLDER, name, META), meta.model_dump(mode="json"))
    latest = Latest(checkpoint=f"{FOLDER}/{name}", images_seen=meta.images_seen)
    storage.write_json(storage.join(run, LATEST), latest.model_dump())
    first = storage.join(run, FIRST)
    if not storage.exists(first):
        storage.write_json(first, latest.model_dump())
    try:
        stay = keep(list(complete(run))) | {step}
        for folder in _folders(run):
            if int(folder.removeprefix("step_")) not in stay:
                _delete(storage.join(run, FOLDER, folder))
    except OSError as error:  # the checkpoint is stored; the next save tries again
        logger.warning("old checkpoints could not be deleted, training goes on: %s", error)


def _gathered(mine: Any, world_size: int, group: dist.ProcessGroup | None) -> list[Any]:
    """What every rank has to say, in their order."""
    everyone = [mine]
    if world_size > 1:
        everyone = [None] * world_size
        dist.all_gather_object(everyone, mine, group=group)
    return everyone


def _step_back() -> None:
    """Let the calling thread run where others leave a CPU free, for the rest of its life.

    A step on a CPU waits for the slowest of its threads, so the one that is interrupted costs all
    of them that time. Elsewhere than on Linux niceness belongs to the whole process, and stays.
    """
    if hasattr(os, "sched_setaffinity"):  # Linux
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def _cause(error: BaseException) -> str:
    """What went wrong, in a line."""
    return " ".join(str(error).split()) or type(error).__name__


class Saver:
    """Stores checkpoints while training goes on; every rank makes one, and calls it alike.

    One save is in work at a time. What a rank's thread says to the others' goes through a process
    group of its own, so it never meets what training says at the same moment.

    Args:
        run: URI of the run folder.
        rank: number of this process.
        world_size: number of processes.
        keep: see `save`.
        check: see `save`.
    """

    def __init__(
        self,
        run: str,
        *,
        rank: int,
        world_size: int,
        keep: Callable[[list[int]], set[int]],
        check: Callable[[], None],
    ) -> None:
        self.run, self.rank, self.world_size = run, rank, world_size
        self.keep, self.check = keep, check
        self._group: dist.ProcessGroup | None = None
        if world_size > 1:
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        self._copy: dict[str, Any] | None = None
        self._thread: threading.Thread | None = None
        self._uri = ""
        self._error: BaseException | None = None

    def prepare(self, state: Stateful) -> None:
        """Take the memory of the copy, after the run's first step, so that no save waits for it.

        Not before: asked for its state before a step, an optimizer counts one.
        """
        if self._copy is None:
            live = state.state_dict()
            self._copy = _create_cpu_state_dict(live, pin_memory=torch.cuda.is_available())
            _copy_state_dict(live, self._copy)  # touches each page

    @property
    def is_prepared(self) -> bool:
        """Whether the run has had a step, after which its state may be asked for."""
        return self._copy is not None

    def start(
        self, step: int, state: Stateful, meta: Meta, before: Callable[[], None] | None = None
    ) -> None:
        """Copy the state and begin to store the copy; `prepare` was called before, and the save
        before was collected.

        The copy keeps its memory for the next save: as much as weights, optimizer and averages of
        this rank.
        """
        assert self._thread is None
        assert self._copy is not None
        frozen = _copy_state_dict(state.state_dict(), self._copy)

        def work() -> None:
            _step_back()
            try:
                self._uri = save(
                    self.run, step, frozen, meta, rank=self.rank, world_size=self.world_size,
                    keep=self.keep, check=self.check, group=self._group, before=before,
                )  # fmt: skip
            except BaseException as error:  # handed to the training thread
                self._error = error

        self._uri, self._error = "", None
        # A daemon: a process that has lost its peers must be able to end.
        self._thread = threading.Thread(target=work, name="jit-save", daemon=True)
        self._thread.start()

    def poll(self) -> str:
        """URI of the checkpoint that every rank has finished storing; empty if there is none.

        All ranks get the same answer in the same step; they talk only while a save is in work.

        Raises:
            SaveFailed: it could not be stored.
        """
        if self._thread is None:
            return ""
        done = torch.tensor(int(not self._thread.is_alive()))
        if self.world_size > 1:
            dist.all_reduce(done, dist.ReduceOp.MIN)
        return self.wait() if done else ""

    def wait(self) -> str:
        """Like poll, but wait for the end of a save in work."""
        if self._thread is None:
            return ""
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # which holds this frame: no circle may keep the process group until the end
        return self._uri

    def leave(self) -> None:
        """Give a save in work some time to end; for a process that ends by an error."""
        if self._thread is not None:
            self._thread.join(LEAVE_S)


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
            if STEP.fullmatch(folder):
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

    def create_stream(self, path: str, mode: str) -> storage.Ranges:
        assert mode == "rb"
        return storage.Ranges(path)

    def concat_path(self, path: str, suffix: str) -> str:
        return storage.join(path, suffix)


class Reader(FileSystemReader):
    """torch.distributed.checkpoint from a URI, by byte ranges, without executing its pickle."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.fs: Any = _Uris()
        self.path: Any = uri

    def _slice_file(self, file: Any, info: Any) -> IO[bytes]:
        # One request, where torch.load makes many; storage asks again while a store is busy.
        return io.BytesIO(file.read(info.offset, info.length))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        content = storage.read_bytes(storage.join(self.path, ".metadata"))
        found: Metadata = _MetadataUnpickler(io.BytesIO(content)).load()
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

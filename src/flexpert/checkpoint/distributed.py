"""Training checkpoints: torch distributed checkpoint in the step directories of `envelope`.

A checkpoint may be saved on one layout and loaded on another: every tensor is saved once, in parts, under its name.
Each rank's random generators are saved as tensors, too, so that all is tensors: what is none, PyTorch would unpickle.
Nothing is opened before the run's own key has vouched for it; and so that no file can run code whoever wrote it,
`.metadata` may name only PyTorch's own records of a checkpoint, and tensors are read with `weights_only`.
"""

import errno
import hashlib
import io
import os
import pickle
import random
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path, PosixPath
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata, staging, state_dict_loader, state_dict_saver
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException

from flexpert.checkpoint import envelope
from flexpert.checkpoint.envelope import Damaged
from flexpert.checkpoint.sharding import local_part
from flexpert.checkpoint.store import atomic_directory
from flexpert.config.groups import CheckpointConfig
from flexpert.errors import UserError
from flexpert.model.transformer import Transformer
from flexpert.parallel.environment import is_first, num_ranks, rank
from flexpert.parallel.process import barrier, on_first
from flexpert.records import sha256_file, sha256_hex
from flexpert.testing import reached

#: One process is meant where there is one.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")

#: What `.metadata` is made of, beside `torch.dtype`s and paths. We save tensors alone: what is none, PyTorch would
#: unpickle whatever it names.
METADATA_PARTS: dict[tuple[str, str], Any] = {
    (part.__module__, part.__qualname__): part
    for part in (
        metadata.Metadata, metadata.MetadataIndex, metadata.StorageMeta, metadata.TensorStorageMetadata,
        metadata.ChunkStorageMetadata, metadata.TensorProperties,
        metadata._MEM_FORMAT_ENCODING, filesystem._StorageInfo, torch.Size, torch.serialization._get_layout,
    )
}  # fmt: skip


@contextmanager
def directory_of_all(final: Path) -> Iterator[Path]:
    """`atomic_directory` that all ranks write into: it takes its name when all have."""
    with ExitStack() as stack:
        yield on_first(lambda: stack.enter_context(atomic_directory(final)))
        barrier()
    barrier()


def trained_state(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Trained parameters and their optimiser state; what is frozen is the base's, and is not saved again.

    Before the first update AdamW has no state: it is given the one that it begins with, to be saved or loaded into.
    """
    parameters: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in parameters.values():
        if not optimizer.state[parameter]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=local_part(parameter)[0].device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }
    return {"model": parameters, "optimizer": {name: optimizer.state[p] for name, p in parameters.items()}}


def generators() -> dict[str, Tensor]:
    """The state of this rank's random generators, under names of its own."""
    version, numbers, following = random.getstate()
    kind, keys, position, has_gauss, gauss = cast(tuple[str, Any, int, int, float], np.random.get_state(legacy=True))
    assert (version, kind) == (3, "MT19937")
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(numbers, dtype=torch.int64),
        "python_following": torch.tensor([following is not None, following or 0.0], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_following": torch.tensor(gauss, dtype=torch.float64),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state()
    return {f"{rank()}.{name}": value for name, value in state.items()}


def set_generators(state: dict[str, Tensor]) -> None:
    """The inverse of `generators`."""
    of = {name.partition(".")[2]: value for name, value in state.items()}
    torch.set_rng_state(of["torch"])
    has, value = of["python_following"].tolist()
    random.setstate((3, tuple(of["python"].tolist()), value if has else None))
    *keys, position, has_gauss = of["numpy"].tolist()
    gauss = of["numpy_following"].item()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, gauss))
    if "cuda" in of:
        torch.cuda.set_rng_state(of["cuda"])


class HashedFile(io.BufferedWriter):
    """A new file that hashes what is written to it."""

    def __init__(self, path: Path, step: int) -> None:
        super().__init__(io.FileIO(path, "xb"), 1 << 20)
        self.digest, self.step = hashlib.sha256(), step
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            reached("shard", self.step)
            self.digest.update(data)
            return super().write(data)
        except OSError as error:  # what calls this, within `torch.save`, would make another error of it
            self.error = error
            return len(data)


class HashedFiles(filesystem.FileSystem):
    """PyTorch's access to files, which hashes those that it writes.

    Attributes:
        written: name → file.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.written: dict[str, HashedFile] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with HashedFile(Path(path), self.step) as file:
            self.written[Path(path).name] = file
            yield file
            if file.error is not None:
                raise file.error
            if not file.closed:  # `.metadata`, of which PyTorch syncs what is not in this buffer any more
                file.flush()
                os.fsync(file.fileno())


class Saver:
    """Writes checkpoints beside the training: `save` returns when the state was copied.

    All ranks call the same methods in the same order, and save in a thread, over a group of their own. One checkpoint
    is written at a time.

    Args:
        directory: of the run's checkpoints.
        key: of `envelope.open_key`, on the first rank.
        config: the group `checkpoint`.
        on_gpu: whether the state is in the memory of one.
    """

    def __init__(self, directory: Path, key: bytes, config: CheckpointConfig, on_gpu: bool = False) -> None:
        self.directory, self.key, self.keep, self.keep_every = directory, key, config.keep, config.keep_every
        timeout = timedelta(seconds=config.timeout)
        self.group = dist.new_group(backend="gloo", timeout=timeout) if num_ranks() > 1 else None
        options = staging.StagingOptions(
            use_pinned_memory=on_gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=on_gpu
        )
        self.stager = staging.DefaultStager(options)
        self.pending: Future[None] | None = None

    def save(
        self,
        step: int,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        content: dict[str, Any],
        is_logged: bool = True,
    ) -> None:
        """Begin to write a step that has no checkpoint yet.

        Args:
            content: JSON: what a run needs to go on.
            is_logged: whether the records of the run until then are on the disk; if not, this fails.
        """
        assert self.pending is None, "`wait` comes first"
        reached("staging", step)
        state = {**trained_state(model, optimizer), "generators": generators()}
        staged = self.stager.stage(state)
        assert isinstance(staged, dict)
        pending: Future[None] = Future()
        self.pending = pending

        def work() -> None:
            try:
                self.write(step, staged, content, is_logged)
            except BaseException as error:
                pending.set_exception(error)
            else:
                pending.set_result(None)

        # A pool's thread would be waited for at the end, also where it waits for a rank that is lost.
        threading.Thread(target=work, name="checkpoint", daemon=True).start()

    def wait(self) -> OSError | None:
        """Until nothing is being written any more; returns what was in the way, the same on every rank."""
        pending, self.pending = self.pending, None
        try:
            if pending is not None:
                pending.result()
        except OSError as error:
            return error
        return None

    def close(self) -> None:
        """Where the run ends by an error, one process finishes its writing; several might wait in vain."""
        if self.pending is not None and num_ranks() == 1:
            self.pending.exception()
        self.stager.close()

    def write(self, step: int, state: dict[str, Any], content: dict[str, Any], is_logged: bool) -> None:
        """In the thread. Room is made by deleting older checkpoints, never the newest."""
        temporary = envelope.partial_path(self.directory, step)

        def begin() -> None:
            if not is_logged:
                raise OSError(errno.EIO, "its rows are not in metrics.jsonl yet")
            envelope.sweep(self.directory)
            envelope.make_room(self.directory, state_bytes(state), self.keep_every)
            temporary.mkdir(parents=True)

        self.first(begin)
        # Nothing is to be copied ahead: the state is in the host's memory. PyTorch would wait for the GPU.
        writer = filesystem.FileSystemWriter(temporary, per_thread_copy_ahead=0)
        writer.fs = files = HashedFiles(step)
        try:
            state_dict_saver.save(state, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
        except CheckpointException as error:
            causes = {number: cause for number, (cause, _) in error.failures.items()}
            failed = {number: cause for number, cause in causes.items() if isinstance(cause, OSError)}
            if len(failed) < len(causes):
                raise
            number, cause = next(iter(failed.items()))
            self.first(lambda: self.give_up(temporary, cause.errno))
            raise OSError(cause.errno, f"{cause.strerror} (rank {number})") from error

        own = {name: file.digest.hexdigest() for name, file in files.written.items() if name.endswith(".distcp")}
        parts: list[dict[str, str]] = [own]
        if self.group is not None:
            parts *= num_ranks()
            dist.all_gather_object(parts, own, group=self.group)

        def finish() -> None:
            digests = {".metadata": sha256_file(temporary / ".metadata")}
            for part in parts:
                digests |= part
            try:
                envelope.commit(self.directory, step, digests, {"torch": torch.__version__, **content}, self.key)
            except OSError as error:
                self.give_up(temporary, error.errno)
                raise
            try:
                envelope.make_durable(self.directory, step)
                envelope.retain(self.directory, self.keep, self.keep_every)
            except OSError as error:  # it is saved nevertheless
                print(f"note: {self.directory}: older checkpoints stay: {error.strerror}", flush=True)

        self.first(finish)

    def give_up(self, temporary: Path, reason: int | None) -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        if reason in envelope.NO_ROOM:  # a quota, which the file system does not tell of before
            envelope.retain(self.directory, 1, self.keep_every)

    def first(self, function: Callable[[], None]) -> None:
        """Run it on the first rank, and raise there and elsewhere the OSError that it raises."""
        failure: Exception | None = None
        outcome: list[tuple[int, str] | str | None] = [None]
        if is_first():
            try:
                function()
            except OSError as error:
                outcome = [(error.errno or 0, error.strerror or str(error))]
            except Exception as error:
                failure, outcome = error, [f"{type(error).__name__}: {error}"]
        if self.group is not None:
            dist.broadcast_object_list(outcome, group=self.group)
        if failure is not None:
            raise failure
        if isinstance(outcome[0], str):
            raise RuntimeError(f"rank 0: {outcome[0]}")
        if outcome[0] is not None:
            raise OSError(*outcome[0])


def checkpoint_bytes(model: Transformer) -> int:
    """What a checkpoint of this model takes, but for headers: trained parameters and two moments of each."""
    return 3 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def state_bytes(state: Any) -> int:
    """What the tensors of a state take in a checkpoint, over all ranks, with 2 KiB for each one's header and index."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size() + 2048
    return sum(map(state_bytes, state.values()))


def load(
    directory: Path,
    key: bytes,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    accept: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any] | None:
    """Restore in place from the newest checkpoint that is whole, and return its record; None: there is none.

    What is damaged is set aside with a line that names the file, and the checkpoint before is taken.

    Args:
        key: of `envelope.open_key`, on the first rank.
        accept: raises `UserError` where a record is not of what is trained here, before a tensor is touched.

    Raises:
        UserError: as `accept`; every checkpoint is damaged, which leaves all as it is; a file cannot be read, is of
            another model, or asks for code to be run.
    """
    damaged: list[tuple[int, str]] = []
    for step in reversed(on_first(lambda: envelope.steps(directory))):
        record, damage = check(directory, step, key)
        if record is not None:
            break
        damaged.append((step, damage))
    else:
        if damaged:
            found = "; ".join(damage for _, damage in damaged)
            raise UserError(
                f"no checkpoint in {directory} is whole: {found}; put back what is missing or altered, or choose "
                "another output_dir to begin anew"
            )
        return None
    accept(record)
    fill(envelope.step_path(directory, step), record, model, optimizer)
    for newer, damage in damaged:
        to = on_first(lambda newer=newer: envelope.set_aside(directory, newer))  # type: ignore[misc]
        print(f"warning: {damage}; it is now in {to}; the checkpoint before it is taken", flush=True)
    return record


def check(directory: Path, step: int, key: bytes) -> tuple[dict[str, Any] | None, str]:
    """The record of a step, or None and what is wrong; every rank hashes some of the files, which may be large.

    Raises:
        UserError: some rank cannot read what is there.
    """

    def read() -> tuple[dict[str, Any] | None, str]:
        try:
            return envelope.read_checked(directory, step, key), ""
        except Damaged as error:
            return None, str(error)

    record, damage = on_first(read)
    if record is None:
        return None, damage
    path, names = envelope.step_path(directory, step), list(record["files"])[rank() :: num_ranks()]
    try:
        own = envelope.damaged_files(path, {name: record["files"][name] for name in names}), ""
    except OSError as error:
        own = list[str](), f"{error.filename} cannot be read by rank {rank()}: {error.strerror}"
    found = [own] * num_ranks()
    if num_ranks() > 1:
        dist.all_gather_object(found, own)
    for _, unread in found:
        if unread:
            raise UserError(unread)
    for name in sorted(name for part, _ in found for name in part):
        return None, f"{path / name} was altered since it was written"
    return record, ""


def fill(path: Path, record: dict[str, Any], model: Transformer, optimizer: torch.optim.Optimizer) -> None:
    """Restore in place from a step directory that was checked.

    Raises:
        UserError: it is of another model; a file asks for code to be run.
    """
    state = trained_state(model, optimizer)
    try:
        reader = Reader(path, record["files"][".metadata"])
        check_model(path, state, reader)
        own = generators()
        if all(f"generators.{name}" in reader.read_metadata().state_dict_metadata for name in own):
            state["generators"] = own  # a rank that was not there when it was saved has none
        state_dict_loader.load(state, storage_reader=reader, no_dist=not dist.is_initialized())
    except (pickle.UnpicklingError, CheckpointException) as error:
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        if not any(isinstance(cause, pickle.UnpicklingError) for cause in causes):
            raise
        raise UserError(
            f"{path} is no checkpoint of ours, and is not loaded: it was written by PyTorch {record.get('torch')}, "
            f"and this is {torch.__version__}"
        ) from error
    if "generators" in state:
        set_generators(state["generators"])


def check_model(path: Path, state: dict[str, Any], reader: "Reader") -> None:
    """Raises `UserError` where a checkpoint has other tensors than `state`, of which PyTorch would load what fits."""
    entries = reader.read_metadata().state_dict_metadata
    names = [name for name in entries if not name.startswith("generators.")]
    saved = {name: getattr(entries[name], "size", None) for name in names}
    wanted = {name: value.size() for name, value in flatten_state_dict(state)[0].items()}
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            there, here = (f"{[*(sizes[name] or ())]}" if name in sizes else "none" for sizes in (saved, wanted))
            raise UserError(
                f"{path} is of another model ({name}: {there} there, {here} here): choose another output_dir"
            )


class MetadataUnpickler(pickle.Unpickler):
    """Reads `.metadata`, and refuses a pickle that names anything else than that is made of."""

    def find_class(self, module: str, name: str) -> Any:
        if part := METADATA_PARTS.get((module, name)):
            return part
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if module in ("pathlib", "pathlib._local") and name == "PosixPath":  # Python 3.13 calls it the latter
            return PosixPath
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint's metadata")


class Reader(filesystem.FileSystemReader):
    """PyTorch's, with `.metadata` read by `MetadataUnpickler`, at once; tensors it reads with `weights_only` anyway.

    Raises:
        pickle.UnpicklingError: `.metadata` is something else than the hash says, or than a checkpoint's.
    """

    def __init__(self, path: Path, digest: str) -> None:
        super().__init__(path)
        content = (path / ".metadata").read_bytes()
        if sha256_hex(content) != digest:
            raise pickle.UnpicklingError("it was altered since it was checked")
        self._metadata: metadata.Metadata = MetadataUnpickler(io.BytesIO(content)).load()
        if not isinstance(self._metadata, metadata.Metadata):
            raise pickle.UnpicklingError("it holds no metadata")
        if not all(envelope.FILE_NAME.fullmatch(info.relative_path) for info in self._metadata.storage_data.values()):
            raise pickle.UnpicklingError("it names files that are none of a checkpoint's")

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        return self._metadata

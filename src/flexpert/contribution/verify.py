"""Check a contribution: its record on reading, its bytes on copying or on their own.

A contribution comes from someone else. `read_contribution` checks what can be checked without reading weights,
`open_contribution` that the files hold the tensors that the record lists, `verify` every byte. Assembly does not call
`verify`: it checks the bytes that it copies, so that nothing can change between the check and the copy.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexpert.assembly.tensors import (
    ITEM_BYTES,
    SafetensorsFile,
    TensorDigest,
    TensorInfo,
    TensorSet,
    all_finite,
    open_tensors,
)
from flexpert.checkpoint.directory import ModelDirectory
from flexpert.checkpoint.layout import STORED_DTYPES, Architecture
from flexpert.contribution.record import (
    CONTRIBUTION_KIND,
    RECORD_NAME,
    Contribution,
    ExpertIdentity,
    check_identity,
    expert_shapes,
)
from flexpert.errors import UserError
from flexpert.fields import FileEntry, require, require_sha256
from flexpert.records import read_record


def read_contribution(directory: Path) -> Contribution:
    """Read a contribution's record and check all that needs no weights.

    Raises:
        UserError: the directory or its record is missing or malformed, a tensor that the architecture needs is not
            listed or another one is, the record was altered, or a listed file is missing, a link, outside the
            directory, or of another size.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} does not exist or is not a directory; give the directory of a contribution")
    where = directory / RECORD_NAME
    _refuse_link(where)
    record = read_record(where, CONTRIBUTION_KIND)
    contribution = _parse(record, directory)
    check_identity(contribution.identity, where)
    _check_tensor_list(contribution, where)
    if contribution.digest != require(record, "digest", str, where):
        raise UserError(f"{where} was altered after it was written (its digest differs); fetch the contribution again")
    for file in contribution.files:
        _check_file(directory / file.name, file)
    return contribution


def _parse(record: Mapping[str, Any], directory: Path) -> Contribution:
    where = directory / RECORD_NAME
    license_ = None if record.get("license") is None else require(record, "license", str, where)
    router = require(record, "router", dict, where)
    require(router, "bias", bool, where)
    require(router, "init", str, where)
    files = tuple(FileEntry.from_json(file, where) for file in require(record, "files", list, where))
    if len({file.name for file in files}) < len(files):
        raise UserError(f"{where} lists a file twice; write the record again")
    return Contribution(
        directory=directory,
        identity=ExpertIdentity(require(record, "id", str, where), require(record, "title", str, where), license_),
        base_digest=require_sha256(record, "base_digest", where, prefix="sha256:"),
        architecture=Architecture.from_json(require(record, "architecture", dict, where), where),
        dtype=require(record, "dtype", str, where),
        router=router,
        training=require(record, "training", dict, where),
        files=files,
        tensors={
            name: _parse_tensor(name, entry, where) for name, entry in require(record, "tensors", dict, where).items()
        },
    )


def _parse_tensor(name: str, entry: Any, where: Path) -> TensorDigest:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape]} if dtype in ITEM_BYTES and all(
            type(size) is int for size in shape
        ):
            return TensorDigest(dtype, tuple(shape), require_sha256(entry, "sha256", f"{where}: the tensor {name!r}"))
    raise UserError(f"{where}: the entry of the tensor {name!r} is malformed; write the record again")


def _check_tensor_list(contribution: Contribution, where: Path) -> None:
    tensors, architecture = contribution.tensors, contribution.architecture
    if contribution.dtype not in STORED_DTYPES:
        raise UserError(f"{where} has the dtype {contribution.dtype!r}; an expert is one of {', '.join(STORED_DTYPES)}")
    # Before the names are listed: a hostile record may claim any number of layers.
    if not 0 < architecture.num_hidden_layers <= len(tensors):
        raise UserError(
            f"{where} claims {architecture.num_hidden_layers} layers but lists {len(tensors)} tensors; "
            "pack the expert again"
        )
    shapes = expert_shapes(architecture, contribution.has_bias)
    _check_same_names(tensors, shapes, where)
    for name, shape in shapes.items():
        _check_layout(name, tensors[name], contribution.dtype, shape, where)


def _check_same_names(found: Mapping[str, object], expected: Mapping[str, object], where: Path) -> None:
    for name in expected:
        if name not in found:
            raise UserError(f"{where}: the tensor {name!r} is missing; pack the expert again")
    for name in found:
        if name not in expected:
            raise UserError(f"{where}: the tensor {name!r} is not part of a contribution; pack the expert alone")


def _check_layout(name: str, found: TensorDigest | TensorInfo, dtype: str, shape: tuple[int, ...], where: Path) -> None:
    if found.dtype != dtype:
        raise UserError(f"{where}: the tensor {name!r} has the dtype {found.dtype}, not {dtype}; pack the expert again")
    if found.shape != shape:
        raise UserError(
            f"{where}: the tensor {name!r} has the shape {list(found.shape)}, not {list(shape)}; pack the expert again"
        )


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise UserError(f"{path} is a link; a contribution holds its files itself: copy the file there")


def _check_file(path: Path, file: FileEntry) -> None:
    _refuse_link(path)
    if not path.is_file():
        raise UserError(f"{path} is listed in {RECORD_NAME} but missing; fetch the contribution again")
    if path.stat().st_size != file.bytes:
        raise UserError(f"{path} has {path.stat().st_size} bytes, {RECORD_NAME} says {file.bytes}; fetch it again")


@dataclass(frozen=True)
class OpenContribution:
    """A contribution whose files are open and hold exactly the tensors that its record lists."""

    record: Contribution
    tensors: TensorSet

    def check_sha256(self, name: str, sha256: str) -> None:
        """Compare the SHA-256 of the bytes that were read with the record's.

        Raises:
            UserError: they differ.
        """
        if sha256 != self.record.tensors[name].sha256:
            raise UserError(
                f"{self.tensors.path_of(name)}: the tensor {name!r} was altered (its SHA-256 differs); "
                "fetch the contribution again"
            )

    def read_checked(self, name: str) -> bytes:
        """The bytes of a small tensor, if they are finite and what the record says.

        Raises:
            UserError: they are not.
        """
        data = self.tensors.read_bytes(name)
        _check_finite(data, name, self.record.dtype, self.tensors.path_of(name))
        self.check_sha256(name, hashlib.sha256(data).hexdigest())
        return data


def _check_finite(piece: bytes, name: str, dtype: str, path: Path) -> None:
    if not all_finite(piece, dtype):
        raise UserError(f"{path}: the tensor {name!r} holds NaN or infinity; pack a checkpoint from before it diverged")


@contextmanager
def open_contribution(directory: Path) -> Iterator[OpenContribution]:
    """Open a contribution's files and compare their headers with the record.

    Raises:
        UserError: as `read_contribution`, a file is malformed, or the files and the record disagree on a tensor.
    """
    record = read_contribution(directory)
    with open_tensors(directory / file.name for file in record.files) as tensors:
        _check_same_names(tensors.tensors, record.tensors, directory)
        for name, digest in record.tensors.items():
            _check_layout(name, tensors.tensors[name], digest.dtype, digest.shape, tensors.path_of(name))
        yield OpenContribution(record, tensors)


def verify(directory: Path) -> Contribution:
    """Check a contribution down to its last byte.

    Raises:
        UserError: as `open_contribution`, a tensor or a file was altered, or a tensor holds NaN or infinity.
    """
    with open_contribution(directory) as contribution:
        for file, entry in zip(contribution.tensors.files, contribution.record.files, strict=True):
            _verify_file(contribution, file, entry)
        return contribution.record


def _verify_file(contribution: OpenContribution, file: SafetensorsFile, entry: FileEntry) -> None:
    content = hashlib.sha256(file.header)
    for name in file.tensors:
        tensor = hashlib.sha256()
        for piece in file.read_pieces(name):
            _check_finite(piece, name, contribution.record.dtype, file.path)
            tensor.update(piece)
            content.update(piece)
        contribution.check_sha256(name, tensor.hexdigest())
    if content.hexdigest() != entry.sha256:
        raise UserError(f"{file.path} was altered (its SHA-256 differs from {RECORD_NAME}); fetch it again")


def check_against_base(contribution: Contribution, base: ModelDirectory, digest: str | None = None) -> None:
    """Check that an expert belongs to a public model.

    Args:
        contribution: the expert.
        base: the public model.
        digest: the base digest of `base`, or None while it is not known (it takes a pass over the weights).

    Raises:
        UserError: a field of the architecture, the dtype or the digest differs.
    """
    who = f"{contribution.directory} (expert {contribution.identity.id})"
    contribution.architecture.check_equal(
        base.architecture, who, str(base.path), "give the base that the expert was trained on"
    )
    if contribution.dtype != base.stored_dtype():
        dtype = base.stored_dtype()
        raise UserError(f"{who} is {contribution.dtype}, {base.path} is {dtype}; pack the expert as {dtype}")
    if digest is not None and contribution.base_digest != digest:
        raise UserError(
            f"{who} was trained on another base ({contribution.base_digest[:19]}…) than {base.path} "
            f"({digest[:19]}…); give that base, or train the expert on this one"
        )

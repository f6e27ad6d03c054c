"""`flexpert assemble`, `flexpert remove` and `flexpert verify`.

None writes its `resolved.yaml` into the model: a model directory is passed on, and the paths and names in that file
are nobody's business there. `assembly.json` says what a model consists of.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexpert.assembly.add import add
from flexpert.assembly.assemble import assemble
from flexpert.assembly.files import FILES_AT_A_TIME
from flexpert.assembly.record import RECORD_NAME, AssemblyRecord
from flexpert.assembly.remove import remove
from flexpert.assembly.tensors import TensorDigest, TensorSet, all_finite, open_model
from flexpert.assembly.verify import verify_model
from flexpert.checkpoint.digest import base_digest, digest_of, tokenizer_digest
from flexpert.checkpoint.directory import ModelDirectory
from flexpert.config.paths import check_output
from flexpert.config.stages import AssembleConfig, RemoveConfig, VerifyConfig
from flexpert.contribution.record import PUBLIC_ID
from flexpert.contribution.verify import check_against_base, verify
from flexpert.errors import UserError
from flexpert.records import canonical_json, sha256_hex, write_record


def run_assemble(config: AssembleConfig, resolved: str) -> None:
    """Write the assembled model into `output_dir`."""
    output = Path(config.output_dir)
    contributions = [
        Path(path) for path in config.contributions if path not in config.optional or os.path.lexists(path)
    ]
    if not contributions:
        raise UserError("none of contributions=[DIR,…] is there: a model of the public expert alone is the base itself")
    active, limit = config.active_experts, config.max_file_bytes
    if config.model is None:
        assert config.base is not None, "the config was checked"
        assemble(Path(config.base), contributions, output, active_experts=active, max_file_bytes=limit)
    else:
        add(
            Path(config.model),
            contributions,
            output,
            replace_known=config.replace,
            active_experts=active,
            max_file_bytes=limit,
        )
    print(summary(output))
    print(output)


def run_remove(config: RemoveConfig, resolved: str) -> None:
    """Write the smaller model into `output_dir`."""
    output = Path(config.output_dir)
    record = remove(Path(config.model), config.experts, output, record_removed=config.record_removed)
    if record.tuned:
        print(
            "note: the other experts' router rows were tuned on text of all; tune again without it for a full removal"
        )
    print(f"took out {', '.join(config.experts)}; left: {summary(output)}")
    print(output)


@dataclass(frozen=True)
class Verified:
    """What was read to its last byte and found to be what it says.

    Attributes:
        id: a contribution's; "public" of a public model; None of an assembled model, which has several.
        digest: a contribution's own; of a public model the base digest; of an assembled model that of its record.
        base_digest: the public model.
        files: the files that were compared.
        bytes: their size.
        lines: the same and more, for people.
    """

    id: str | None
    digest: str
    base_digest: str
    files: int
    bytes: int
    lines: list[str]

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id, "digest": self.digest, "base_digest": self.base_digest, "files": self.files,
            "bytes": self.bytes,
        }  # fmt: skip


def run_verify(config: VerifyConfig, resolved: str) -> None:
    """Print what a contribution or a model is and what was checked; write that to `output`, where it is given.

    Raises:
        UserError: it is not what its record says, was trained on another base, or has another digest than it should;
            nothing is written then.
    """
    output = Path(config.output) if config.output is not None else None
    if output is not None:
        check_output_file(output)
    if config.contribution is not None:
        found = verified_contribution(Path(config.contribution), Path(config.base) if config.base else None)
    else:
        assert config.model is not None, "the config was checked"
        model = Path(config.model)
        is_assembled = (model / RECORD_NAME).exists() or ModelDirectory.open(model).experts
        found = verified_model(model) if is_assembled else verified_public(model)
    if config.digest is not None and config.digest != found.digest:
        raise UserError(
            f"{config.contribution or config.model} has the digest {found.digest}, not {config.digest}, which it must "
            "have: fetch it again, or ask its maker which of the two is meant"
        )
    told = "  checked: its digest is the one that was given"
    not_told = (
        "  hashes find damage and mix-ups; whose work it is, they do not prove (digest=… compares it with its maker's)"
    )
    print("\n".join([*found.lines, not_told if config.digest is None else told]))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_record(output, "flexpert.verified", found.to_json())


def check_output_file(path: Path) -> None:
    """Raises `UserError` where a file cannot be written, before hours are spent on reading."""
    if path.is_dir():
        raise UserError(f"output={path} is a directory: give the JSON file to write")
    check_output("output", path.parent)


def verified_contribution(directory: Path, base: Path | None) -> Verified:
    public = ModelDirectory.open(base) if base is not None else None
    if public is not None and public.experts:
        raise UserError(f"base={base} is a mixture; give the public model that the expert was trained on")
    contribution = verify(directory)
    if public is not None:
        check_against_base(contribution, public, base_digest(public.path))
    identity, num_files = contribution.identity, len(contribution.files)
    size = sum(file.bytes for file in contribution.files)
    lines = [
        f"{directory} is the contribution {identity.id} ({identity.title}; {identity.license or 'no licence stated'})",
        f"  digest {contribution.digest}",
        f"  of the base {contribution.base_digest}",
        f"  checked: SHA-256 of {num_files} file{'s' if num_files > 1 else ''} and {len(contribution.tensors)} tensors,"
        f" {size:,} bytes; every number is finite",
        f"  checked: {base} is that base" if base is not None else "  not checked: its base (give base=DIR)",
    ]
    return Verified(identity.id, contribution.digest, contribution.base_digest, num_files, size, lines)


def verified_model(directory: Path) -> Verified:
    record = verify_model(directory)
    active = ModelDirectory.open(directory).config.active_experts
    notes = []
    if active != record.active_experts:
        notes = [f"  note: config.json has {active} experts active for a token, {RECORD_NAME} {record.active_experts}"]
    listed = {file.name for file in record.files}
    others = sorted(path.name for path in directory.iterdir() if path.name not in listed)
    digest, size = assembly_digest(record), sum(file.bytes for file in record.files)
    lines = [
        f"{directory} is {summary(directory)}",
        f"  digest {digest}",
        f"  of the base {record.base_digest}{'; its router rows were tuned' if record.tuned else ''}",
        *(f"  {expert.id}: {expert.contribution or 'the public expert'}" for expert in record.experts),
        f"  checked: SHA-256 of {len(listed)} files, {size:,} bytes;"
        " config.json calls for these tensors, experts and this architecture, and the index lists them",
        *notes,
        f"  without a hash: {', '.join(others)}",
    ]
    return Verified(None, digest, record.base_digest, len(listed), size, lines)


def assembly_digest(record: AssemblyRecord) -> str:
    """Of all that `assembly.json` says: base, contributions, k and every file's hash; it holds no time and no path, so
    whoever assembles the same parts in the same order gets the same."""
    return "sha256:" + sha256_hex(canonical_json(record.to_json()))


def verified_public(directory: Path) -> Verified:
    """Read a public model, against which experts are trained.

    Raises:
        UserError: its tensors are not all BF16 or all F32, or one holds NaN or infinity; it has no tokenizer.json.
    """
    model = ModelDirectory.open(directory)
    dtype, tokenizer = model.stored_dtype(), tokenizer_digest(directory)
    with open_model(directory) as tensors, ThreadPoolExecutor(FILES_AT_A_TIME) as pool:
        digests = pool.map(lambda name: finite_digest(tensors, name), tensors.tensors)
        digest = digest_of(dict(zip(tensors.tensors, digests, strict=True)), tokenizer)
    files = {*model.files.values(), directory / "tokenizer.json"}
    size = sum(path.stat().st_size for path in files)
    shape = ", ".join(f"{name} {value:,}" for name, value in model.architecture.to_json().items())
    lines = [
        f"{directory} is a public model, {size_in_words(model)}, {dtype}",
        f"  digest {digest}",
        "  (tell it to owners in another way than the model reaches them; they compare it: verify digest=…)",
        f"  checked: {len(model.files)} tensors and tokenizer.json, {size:,} bytes; every number is finite",
        f"  architecture, which contributions to it record: {shape}",
    ]
    return Verified(PUBLIC_ID, digest, digest, len(files), size, lines)


def finite_digest(tensors: TensorSet, name: str) -> TensorDigest:
    """Digest a tensor in pieces; raises `UserError` where it holds NaN or infinity."""
    info, content = tensors.tensors[name], hashlib.sha256()
    for piece in tensors.read_pieces(name):
        if not all_finite(piece, info.dtype):
            raise UserError(
                f"{tensors.path_of(name)}: the tensor {name!r} holds NaN or infinity; fetch the model again"
            )
        content.update(piece)
    return TensorDigest(info.dtype, info.shape, content.hexdigest())


def summary(directory: Path) -> str:
    """An assembled model in a few words."""
    model = ModelDirectory.open(directory)
    count = len(model.experts)
    return (
        f"{count} expert{'s' if count > 1 else ''} ({', '.join(model.experts)}), {size_in_words(model)}, "
        f"{len(list(directory.iterdir()))} files"
    )


def size_in_words(model: ModelDirectory) -> str:
    parameters, unit = float(model.config.num_params()), ""
    for larger in ("K", "M", "B"):
        if parameters >= 1000:
            parameters, unit = parameters / 1000, larger
    return f"{parameters:.3g}{unit} parameters"

"""Documents from files: JSON lines (plain, gzip, zstd), parquet, plain text, or the demo's own corpora.

A file is read in one process and parsed in many: `read_batches` yields raw pieces in the order of the files, each of
which knows where it came from, and `Batch.documents` turns a piece into documents wherever it was sent.
"""

import functools
import glob
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from flexpert.data import demo
from flexpert.errors import UserError
from flexpert.records import canonical_json, sha256_hex

DEMO_PREFIX = "demo:"
JSON_LINES = tuple(f"{kind}{packing}" for kind in (".jsonl", ".json") for packing in ("", ".gz", ".zst"))
READ_BYTES = 128 << 10
#: A batch is what one worker tokenises at a time: long enough to outweigh its way there, short enough to share out.
BATCH_BYTES = 512 << 10
BATCH_DOCUMENTS = 256


class Fields(NamedTuple):
    """The fields of a JSON line or parquet row that hold the text and, if any, what comes before it as context."""

    text: str
    prompt: str | None = None


class Document(NamedTuple):
    """Attributes: prompt, context before the text ("" where there is none); text, what is to be learnt."""

    prompt: str
    text: str

    @property
    def whole(self) -> str:
        return self.prompt + self.text


class BadDocument(NamedTuple):
    """What holds no document. Attributes: where (file and line), reason; together they make a sentence."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where} {self.reason}"


class Batch(Protocol):
    """A piece of the input. Attributes: consumed, bytes of the input files that were read up to its end."""

    @property
    def consumed(self) -> int: ...

    def documents(self, fields: Fields) -> Iterator[Document | BadDocument]: ...


@dataclass(frozen=True)
class Lines:
    """Whole JSON lines, of which the first has the number `first` in its file."""

    path: Path
    first: int
    data: bytes
    consumed: int

    def documents(self, fields: Fields) -> Iterator[Document | BadDocument]:
        for number, line in enumerate(self.data.split(b"\n"), self.first):
            if line.strip():
                yield self.parse(f"{self.path} line {number}", line, fields)

    def parse(self, where: str, line: bytes, fields: Fields) -> Document | BadDocument:
        try:
            row = json.loads(line.decode("utf-8-sig"))  # without the byte order mark of Windows' editors
            found = []
            for key, field in (("prompt_field", fields.prompt), ("text_field", fields.text)):
                value = "" if field is None else row.get(field) if isinstance(row, dict) else None
                if not isinstance(value, str):
                    return BadDocument(where, f"has no text field '{field}' (data.{key}=…)")
                value.encode()  # fails for half of a surrogate pair, which JSON can spell and no file can hold
                found.append(value)
            return Document(*found)
        except json.JSONDecodeError as error:
            return BadDocument(where, f"is not JSON: {error.msg}")
        except UnicodeError as error:
            reason = error.reason if isinstance(error, UnicodeDecodeError | UnicodeEncodeError) else str(error)
            return BadDocument(where, f"is not UTF-8 text: {reason}")
        except (ValueError, RecursionError) as error:  # a number with thousands of digits, a thousand brackets
            return BadDocument(where, f"is not JSON that can be read: {error}")


@dataclass(frozen=True)
class Rows:
    """Values of parquet rows, of which the first has the number `first` in its file; `prompts` may be absent."""

    path: Path
    first: int
    texts: list[object]
    prompts: list[object] | None
    consumed: int

    def documents(self, fields: Fields) -> Iterator[Document | BadDocument]:
        for place, text in enumerate(self.texts):
            prompt = self.prompts[place] if self.prompts is not None else ""
            for field, value in ((fields.prompt, prompt), (fields.text, text)):
                if not isinstance(value, str):
                    kind = "no value" if value is None else f"a {type(value).__name__}"
                    reason = f"has {kind} where column '{field}' should have text"
                    yield BadDocument(f"{self.path} row {self.first + place}", reason)
                    break
            else:
                yield Document(str(prompt), str(text))


@dataclass(frozen=True)
class TextFiles:
    """Plain-text files, each of which is one document."""

    contents: list[tuple[Path, bytes]]
    consumed: int

    def documents(self, fields: Fields) -> Iterator[Document | BadDocument]:
        for path, content in self.contents:
            try:
                yield Document("", content.decode("utf-8-sig"))  # read_text would turn \r\n into \n
            except UnicodeDecodeError as error:
                yield BadDocument(str(path), f"is not UTF-8 text (byte {error.start})")


#: Ends of names of files that hold tables or formatted text, and would be read as one document of plain text.
NO_TEXT = (
    ".csv", ".tsv", ".xls", ".xlsx", ".ods", ".doc", ".docx", ".odt", ".rtf", ".pdf", ".zip", ".tar", ".tgz", ".7z",
    ".arrow", ".feather", ".orc", ".avro", ".npy", ".bin", ".idx",
)  # fmt: skip


@functools.cache
def demo_documents(name: str, seed: int) -> tuple[str, ...]:
    """Kept: they take seconds to make, and `prepare` reads them twice where it trains a tokenizer."""
    if name not in demo.CORPORA:
        raise UserError(f"data.documents=demo:{name}: there is no demo corpus '{name}'; {', '.join(demo.CORPORA)}")
    return tuple(demo.documents(name, seed))


def matching_files(source: str) -> list[Path]:
    """The files of a glob in sorted order."""
    found = [source] if Path(source).is_file() else sorted(glob.glob(source, recursive=True))  # a name may hold [ ]
    return [Path(path) for path in found if Path(path).is_file()]


def input_identity(source: str) -> dict[str, Any]:
    """What must be the same for all shards, or files are dealt out twice and not at all: how many files match, and a
    SHA-256 over their names and sizes in order. The names are without their directories, and only their hash is kept.
    """
    paths = matching_files(source)
    listed = [[path.name, path.stat().st_size] for path in paths]
    return {"count": len(paths), "sha256": sha256_hex(canonical_json(listed))}


def input_files(source: str, shard: tuple[int, int] = (0, 1)) -> list[Path]:
    """The files of a glob in sorted order; of shard (i, n) every n-th, from the i-th on. None for a demo corpus.

    Raises:
        UserError: no file matches, or there are fewer files than shards.
    """
    part, num_parts = shard
    if source.startswith(DEMO_PREFIX):
        if num_parts > 1:
            raise UserError(f"shard={part}/{num_parts} deals out files, and data.documents={source} has none")
        return []
    paths = matching_files(source)
    for path in paths:
        if path.name.lower().endswith(NO_TEXT):
            raise UserError(
                f"{path} is no plain text: make it JSON lines or parquet, with a line or row for each document"
            )
    if not paths:
        if source and Path(source).is_dir():
            raise UserError(f"data.documents={source} is a directory: give the files in it, such as '{source}/*.jsonl'")
        raise UserError(f"data.documents={source} matches no file")
    if len(paths) < num_parts:
        raise UserError(
            f"shard={part}/{num_parts}: data.documents={source} matches {len(paths)} files, too few for {num_parts} "
            "shards: ask for fewer"
        )
    return paths[part::num_parts]


def read_batches(source: str, fields: Fields, seed: int, shard: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
    """Yield the documents of a source in the sorted order of its files, unparsed.

    Args:
        source: a glob, or `demo:NAME`.
        fields: where the text is in a JSON line or parquet row.
        seed: seed of a demo corpus.
        shard: (i, n) for the i-th of n parts of the files.

    Raises:
        UserError: no file matches, or a file cannot be read: names it and the last line that was.
    """
    if source.startswith(DEMO_PREFIX):
        texts = demo_documents(source.removeprefix(DEMO_PREFIX), seed)
        for start in range(0, len(texts), BATCH_DOCUMENTS):
            yield Rows(Path(source), start + 1, list(texts[start : start + BATCH_DOCUMENTS]), None, 0)
        return
    before = 0
    plain: list[tuple[Path, bytes]] = []
    for path in input_files(source, shard):
        is_plain = not path.name.endswith((".parquet", *JSON_LINES))
        if plain and (not is_plain or len(plain) == BATCH_DOCUMENTS or sum(len(c) for _, c in plain) > BATCH_BYTES):
            yield TextFiles(plain, before)
            plain = []
        if is_plain:
            plain.append((path, read_whole(path)))
        elif path.name.endswith(".parquet"):
            yield from read_parquet(path, fields, before)
        else:
            yield from read_lines(path, before)
        before += path.stat().st_size
    if plain:
        yield TextFiles(plain, before)


def read_documents(
    source: str, fields: Fields, seed: int, shard: tuple[int, int] = (0, 1), on_bad: str = "fail"
) -> Iterator[Document]:
    """The documents of `read_batches`, one by one; bad ones raise `UserError` or, with on_bad="skip", are left out."""
    for batch in read_batches(source, fields, seed, shard):
        for document in batch.documents(fields):
            if isinstance(document, Document):
                yield document
            elif on_bad == "fail":
                raise UserError(str(document))


def read_whole(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def pieces(path: Path) -> Iterator[tuple[bytes, int]]:
    """Content of a plain or compressed file in pieces, each with the position in the file after it."""
    with path.open("rb") as file:
        if path.name.endswith(".zst"):
            yield from ((piece, file.tell()) for piece in zstd_pieces(iter(lambda: file.read(READ_BYTES), b"")))
        elif path.name.endswith(".gz"):
            with gzip.GzipFile(fileobj=file) as content:
                # read1, not read: of a file that was cut short we get what was before the cut.
                while piece := content.read1(READ_BYTES):
                    yield piece, file.tell()
        else:
            while piece := file.read(READ_BYTES):
                yield piece, file.tell()


def zstd_pieces(compressed_pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Content of all frames. `zstandard.open` takes the part before a cut for the whole; here that is an `EOFError`."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor()
    frame = None
    for compressed in compressed_pieces:
        while compressed:
            frame = frame or decompressor.decompressobj()
            try:
                yield frame.decompress(compressed)
            except zstandard.ZstdError as error:
                raise ValueError(error) from None
            compressed = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("Compressed file ended inside a frame")


def read_lines(path: Path, before: int) -> Iterator[Lines]:
    """Lines of a plain or compressed file, in batches; `before` is the size of the files before it."""
    first, held, num_held, position = 1, list[bytes](), 0, 0
    failure: Exception | None = None
    try:
        for piece, position in pieces(path):
            end = piece.rfind(b"\n") + 1
            if end and num_held + end >= BATCH_BYTES:
                batch = Lines(path, first, b"".join([*held, piece[:end]]), before + position)
                yield batch
                first += batch.data.count(b"\n")
                held, num_held = [piece[end:]], len(piece) - end
            else:
                held.append(piece)
                num_held += len(piece)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        failure = error
    rest = b"".join(held)
    if failure is not None:
        rest = rest[: rest.rfind(b"\n") + 1]  # the lines before the damage: a mistake in one of them is named first
    if rest:
        yield Lines(path, first, rest, before + position)
    if failure is not None:
        number = first - 1 + rest.count(b"\n")
        raise UserError(f"{path} cannot be read after line {number}: {failure}")


def read_parquet(path: Path, fields: Fields, before: int) -> Iterator[Rows]:
    """Rows of a parquet file, in batches; `before` is the size of the files before it."""
    import pyarrow
    import pyarrow.parquet

    size = path.stat().st_size
    first = 1
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        for key, field in (("text_field", fields.text), ("prompt_field", fields.prompt)):
            if field is not None and field not in names:
                raise UserError(f"{path} has no column '{field}' (data.{key}=…); it has {names}")
        columns = [field for field in fields if field is not None]
        for batch in file.iter_batches(BATCH_DOCUMENTS, columns=columns):
            texts = batch.column(fields.text).to_pylist()
            prompts = None if fields.prompt is None else batch.column(fields.prompt).to_pylist()
            consumed = before + size * (first - 1 + len(texts)) // file.metadata.num_rows
            yield Rows(path, first, texts, prompts, consumed)
            first += len(texts)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as parquet: {error}") from None

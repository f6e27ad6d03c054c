"""Documents from files: JSON lines (plain, gzip, zstd), parquet, plain text, or the demo's own corpora."""

import functools
import glob
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from flexpert.data import demo
from flexpert.errors import UserError

DEMO_PREFIX = "demo:"
ZSTD_READ_BYTES = 128 << 10


@functools.cache
def demo_documents(name: str, seed: int) -> tuple[str, ...]:
    """Kept: they take seconds to make, and `prepare` reads them twice where it trains a tokenizer."""
    return tuple(demo.documents(name, seed))


def read_documents(source: str, text_field: str, seed: int) -> Iterator[str]:
    """Yield the text of every document, in the sorted order of the files.

    Args:
        source: a glob, or `demo:NAME`.
        text_field: the field of a JSON line or parquet row that holds the text.
        seed: seed of a demo corpus.

    Raises:
        UserError: no file matches, a file cannot be read, or a line or file lacks the field; names the file and line.
    """
    if source.startswith(DEMO_PREFIX):
        name = source.removeprefix(DEMO_PREFIX)
        if name not in demo.CORPORA:
            raise UserError(f"data.documents={source}: there is no demo corpus '{name}'; {', '.join(demo.CORPORA)}")
        yield from demo_documents(name, seed)
        return
    found = [source] if Path(source).is_file() else sorted(glob.glob(source, recursive=True))  # a name may hold [ ]
    paths = [Path(path) for path in found if Path(path).is_file()]
    if not paths:
        raise UserError(f"data.documents={source} matches no file")
    for path in paths:
        yield from read_file(path, text_field)


def read_file(path: Path, text_field: str) -> Iterator[str]:
    """Documents of one file; its name says the format. A text file is one document."""
    name = path.name
    if name.endswith(".parquet"):
        yield from read_parquet(path, text_field)
    elif name.endswith((".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")):
        yield from read_json_lines(path, text_field)
    else:
        try:
            yield path.read_bytes().decode()  # read_text would turn \r\n into \n
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None


def read_lines(path: Path) -> Iterator[bytes]:
    """Lines of a plain or compressed file."""
    if path.name.endswith(".zst"):
        rest = b""
        for piece in zstd_pieces(path):
            *lines, rest = (rest + piece).split(b"\n")
            yield from lines
        yield rest
    else:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as file:
            yield from file


def zstd_pieces(path: Path) -> Iterator[bytes]:
    """Content of all frames. `zstandard.open` takes the part before a cut for the whole; here that is an `EOFError`."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor()
    frame = None
    with path.open("rb") as file:
        while compressed := file.read(ZSTD_READ_BYTES):
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


def read_json_lines(path: Path, text_field: str) -> Iterator[str]:
    number = 0
    try:
        for number, line in enumerate(read_lines(path), start=1):
            if not line.strip():
                continue
            row = json.loads(line.decode())
            text = row.get(text_field) if isinstance(row, dict) else None
            if not isinstance(text, str):
                raise UserError(f"{path} line {number} has no text field '{text_field}' (data.text_field=…)")
            text.encode()  # fails for half of a surrogate pair, which JSON can spell and no file can hold
            yield text
    except UserError:
        raise
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {number} is not JSON: {error.msg}") from None
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise UserError(f"{path} line {number} is not UTF-8 text: {error.reason}") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path} cannot be read after line {number}: {error}") from None


def read_parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if text_field not in file.schema_arrow.names:
            names = file.schema_arrow.names
            raise UserError(f"{path} has no column '{text_field}' (data.text_field=…); it has {names}")
        row = 0
        for batch in file.iter_batches(columns=[text_field]):
            for text in batch.column(0).to_pylist():
                row += 1
                if not isinstance(text, str):
                    kind = "no value" if text is None else f"a {type(text).__name__}"
                    raise UserError(f"{path} row {row} has {kind} where column '{text_field}' should have text")
                yield text
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as parquet: {error}") from None

"""Documents from files: JSON lines (plain, gzip, zstd), parquet, plain text, or the demo's own corpora."""

import glob
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path

from flexpert.data import demo
from flexpert.errors import UserError

DEMO_PREFIX = "demo:"


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
        yield from demo.documents(name, seed)
        return
    paths = [Path(path) for path in sorted(glob.glob(source, recursive=True)) if Path(path).is_file()]
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
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from None


def open_text(path: Path) -> io.TextIOBase:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8")  # type: ignore[return-value]
    if path.name.endswith(".zst"):
        import zstandard

        return zstandard.open(path, "rt", encoding="utf-8")  # type: ignore[no-any-return]
    return open(path, encoding="utf-8")


def read_json_lines(path: Path, text_field: str) -> Iterator[str]:
    number = 0
    try:
        with open_text(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                text = row.get(text_field) if isinstance(row, dict) else None
                if not isinstance(text, str):
                    raise UserError(f"{path} line {number} has no text field '{text_field}' (data.text_field=…)")
                yield text
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {number} is not JSON: {error.msg}") from None
    except UserError:
        raise
    except (OSError, EOFError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path} cannot be read after line {number}: {error}") from None
    except Exception as error:  # zstandard's own error class, imported only where a .zst file is read
        if type(error).__module__.startswith("zstandard"):
            raise UserError(f"{path} cannot be read after line {number}: {error}") from None
        raise


def read_parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a parquet file: {error}") from None
    if text_field not in file.schema_arrow.names:
        raise UserError(f"{path} has no column '{text_field}' (data.text_field=…); it has {file.schema_arrow.names}")
    for batch in file.iter_batches(columns=[text_field]):
        for text in batch.column(0).to_pylist():
            if not isinstance(text, str):
                raise UserError(f"{path} column '{text_field}' holds a {type(text).__name__} where text is expected")
            yield text

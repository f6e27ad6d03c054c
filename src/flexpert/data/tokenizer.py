"""Tokenizers: `tokenizer.json` and its special tokens, without transformers; training a small one on request."""

import re
import shutil
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import tokenizers

from flexpert.checkpoint.digest import TOKENIZER_FILES, tokenizer_digest
from flexpert.errors import UserError
from flexpert.records import read_json, write_json

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
#: What training reads at once, for it takes hundreds of bytes for each character: what is left, or up to a white space
#: that stands alone, where no word nor run of white space is cut, or where there is none a part of this length.
PIECE = re.compile(r"(?s).{1,8192}\Z|.{1,8192}(?<=\S)(?=\s\S)|.{1,8192}")


@dataclass(frozen=True)
class Tokenizer:
    """A fast tokenizer with the ids that the system needs.

    Attributes:
        directory: where its files are.
        eos_id: id of the token that ends a document.
        pad_id: id of the padding token, or None.
        digest: see `tokenizer_digest`; equal for tokenizers that give the same ids, whatever the files look like, and
            says nothing of `eos_id`.
    """

    directory: Path
    backend: tokenizers.Tokenizer
    eos_id: int
    pad_id: int | None
    digest: str

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; the ids may have holes."""
        return int(max(self.backend.get_vocab(with_added_tokens=True).values())) + 1

    def encode(self, text: str) -> list[int]:
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self.backend.decode(list(ids), skip_special_tokens=False))

    def copy_to(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            if (self.directory / name).exists():
                shutil.copyfile(self.directory / name, directory / name)


def load_tokenizer(directory: Path) -> Tokenizer:
    """Load from a directory with `tokenizer.json` and `tokenizer_config.json`.

    Raises:
        UserError: a file is missing or unreadable, or no end-of-text token is named.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{directory} has no tokenizer.json (slow tokenizers must be converted to fast ones first)")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for a bad file
        raise UserError(f"{path} cannot be read: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    # A document that spells out <|endoftext|> is text about it, not the end of a document.
    backend.encode_special_tokens = True
    settings = read_json(directory / "tokenizer_config.json")

    def token_id(key: str) -> int | None:
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        return backend.token_to_id(token) if isinstance(token, str) else None

    eos_id = token_id("eos_token")
    if eos_id is None:
        raise UserError(f"{directory}/tokenizer_config.json names no eos_token that is in the vocabulary")
    return Tokenizer(directory, backend, eos_id, token_id("pad_token"), tokenizer_digest(directory))


def train_tokenizer(documents: Iterable[str], vocab_size: int, directory: Path) -> Tokenizer:
    """Train a byte-level BPE with single digits and write it as transformers reads it.

    A signal ends the reading at once; what was read by then is merged to the end, the longer the larger the vocabulary.
    """
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (piece[0] for document in documents for piece in PIECE.finditer(document))
    stopped = threading.Event()
    # Signals are heeded in the main thread, which the library would keep to the end.
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(
            backend.train_from_iterator, takewhile(lambda piece: not stopped.is_set(), pieces), trainer
        )
        try:
            training.result()
        except BaseException:
            stopped.set()
            raise
    directory.mkdir(parents=True)
    backend.save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_TEXT,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
        },
    )
    return load_tokenizer(directory)

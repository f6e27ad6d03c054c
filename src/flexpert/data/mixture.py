"""Mixtures: sequences of several data sets in one stream, whose order is a function of the position alone."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flexpert.config.groups import TrainDataConfig
from flexpert.data.dataset import TokenWindows, read_manifest
from flexpert.errors import UserError

#: Times that a data set of a mixture is read before repetition costs more than it gives (Muennighoff et al., 2023).
MAX_EPOCHS = 4.0


class MixedWindows:
    """Sequences of two sources, each in its own order, the second's evenly spread among the first's.

    Of the first i positions, floor(i · share) come from `second`: which is a function of the position alone. A source
    may be a mixture itself, and so there may be any number of them.
    """

    def __init__(
        self, first: "TokenWindows | MixedWindows", second: "TokenWindows | MixedWindows", share: float
    ) -> None:
        assert first.length == second.length
        self.first, self.second, self.share = first, second, share
        self.length: int = first.length

    @property
    def num_tokens(self) -> int:
        return self.first.num_tokens + self.second.num_tokens

    def sequences(self, start: int, count: int) -> Tensor:
        """As `TokenWindows.sequences`."""
        before = np.floor(np.arange(start, start + count + 1) * self.share).astype(np.int64)
        from_second = torch.from_numpy(np.diff(before) == 1)
        taken = int(before[0])
        num_second = int(from_second.sum())
        rows = torch.empty(count, self.length + 1, dtype=torch.long)
        rows[from_second] = self.second.sequences(taken, num_second)
        rows[~from_second] = self.first.sequences(start - taken, count - num_second)
        return rows

    def origins(self, start: int, count: int) -> list[str]:
        """As `TokenWindows.origins`."""
        first = int(np.floor(start * self.share)), int(np.floor((start + count) * self.share))
        num_second = first[1] - first[0]
        return [
            *self.first.origins(start - first[0], count - num_second),
            *self.second.origins(first[0], num_second),
        ]

    def num_taken(self, count: int) -> list[int]:
        """How many of the first `count` sequences come from each source, mixtures taken apart."""
        from_second = int(np.floor(count * self.share))
        return [
            number
            for source, taken in ((self.first, count - from_second), (self.second, from_second))
            for number in (source.num_taken(taken) if isinstance(source, MixedWindows) else [taken])
        ]


def training_windows(
    data: TrainDataConfig, sequence_length: int, seed: int, num_sequences: int
) -> TokenWindows | MixedWindows:
    """The train split of `data.dir`, or the mixture of those of `data.dirs`.

    Args:
        data: names the data sets.
        sequence_length: tokens.
        seed: of the order.
        num_sequences: how many the run will take.

    Raises:
        UserError: the data sets have different tokenizers, or the run would read one of a mixture too often.
    """
    if not data.dirs:
        return TokenWindows(Path(data.dir), "train", sequence_length, seed, loss_mask=True)
    check_one_tokenizer(data)
    sources = [TokenWindows(Path(path), "train", sequence_length, seed, loss_mask=True) for path in data.dirs.values()]
    weights = [data.weights[name] for name in data.dirs]
    windows: TokenWindows | MixedWindows = sources[0]
    for number, source in enumerate(sources[1:], start=1):
        windows = MixedWindows(windows, source, weights[number] / sum(weights[: number + 1]))
    taken = windows.num_taken(num_sequences) if isinstance(windows, MixedWindows) else [num_sequences]
    for name, source, number in zip(data.dirs, sources, taken, strict=True):
        allowed, epochs = data.max_epochs.get(name, MAX_EPOCHS), number / source.num_sequences
        if epochs > allowed:
            raise UserError(
                f"data.dirs.{name}={source.directory} would be read {epochs:.4g} times and data.max_epochs.{name} is "
                f"{allowed:g}: lower data.weights.{name} or the steps, or raise data.max_epochs.{name}"
            )
    return windows


def check_one_tokenizer(data: TrainDataConfig) -> None:
    """Raises `UserError` where data sets of a mixture were tokenised with different tokenizers or ends of documents."""
    (first, path), *others = data.dirs.items()
    expected = read_manifest(Path(path))
    for name, other in others:
        found = read_manifest(Path(other))
        if (found.tokenizer_digest, found.eos_id) != (expected.tokenizer_digest, expected.eos_id):
            raise UserError(
                f"data.dirs.{name}={other} was tokenised with another tokenizer than data.dirs.{first}={path}: "
                f"prepare it again with tokenizer={path}/tokenizer"
            )


def mixture_digests(data: TrainDataConfig) -> dict[str, str]:
    """Digests of the data sets of a mixture, by what a message calls them."""
    return {f"data.dirs.{name}": read_manifest(Path(path)).digest for name, path in data.dirs.items()}

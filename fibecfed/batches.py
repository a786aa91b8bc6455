"""Tokenised samples and the batches made of them: text is tokenised once, batches are padded when they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .data import DataError, Split

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Encoded:
    """n tokenised samples, end to end in one array: sample i is ``tokens[offsets[i]:offsets[i + 1]]``.

    tokens (total,) int64; types (total,) int64, the token types of models that have them, or None; offsets (n + 1,)
    int64; labels (n,) int64; ``pad_id`` and ``padding_side`` as the tokenizer has them.
    """

    tokens: NDArray[np.int64]
    types: NDArray[np.int64] | None
    offsets: Indices
    labels: NDArray[np.int64]
    pad_id: int
    padding_side: str

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[NDArray[np.int64], int]:
        """Tokens (a view) and label of one sample."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        return self.tokens[self.offsets[index] : self.offsets[index + 1]], int(self.labels[index])

    @property
    def lengths(self) -> Indices:
        """(n,) tokens in each sample."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Buckets:
    """Batches of samples of like length; ``inverse`` puts what they gave, one after the other, back in order."""

    batches: list[Indices]
    inverse: Indices


def encode(split: Split, tokenizer: Any, max_tokens: int) -> Encoded:
    """Tokenise a split, longer samples cut to ``max_tokens``.

    Padding on the left is for models that count positions from the batch's ``position_ids``, which then come with every
    batch; a tokenizer with a mask token belongs to an encoder, whose positions start at the left edge, and is refused.

    Raises DataError when ``max_tokens`` leaves no room for text or is more than the model takes, the tokenizer has no
    padding token, an encoder's tokenizer pads on the left, or a sample gives no token.
    """
    if tokenizer.pad_token_id is None:
        raise DataError("tokenizer has no padding token, wanted one: set tokenizer.pad_token")
    if tokenizer.padding_side == "left" and tokenizer.mask_token is not None:
        raise DataError('tokenizer.padding_side is "left", wanted "right" for an encoder')
    special = tokenizer.num_special_tokens_to_add(pair=split.pair is not None)
    if not special < max_tokens <= tokenizer.model_max_length:
        raise DataError(
            f"max_tokens: {max_tokens}, wanted more than the {special} special tokens of a sample and at most the "
            f"model's {tokenizer.model_max_length}"
        )
    if len(split) == 0:
        raise DataError("split has no samples")
    with_types = "token_type_ids" in tokenizer.model_input_names
    fields = tokenizer(
        split.text,
        split.pair,
        truncation=True,
        max_length=max_tokens,
        padding=False,
        return_token_type_ids=with_types,
        return_attention_mask=False,
    )
    lengths = np.array([len(sample) for sample in fields["input_ids"]], dtype=np.int64)
    if lengths.min() == 0:
        raise DataError(f"sample {int(lengths.argmin())} gives no token")
    return Encoded(
        tokens=_flat(fields["input_ids"]),
        types=_flat(fields["token_type_ids"]) if with_types else None,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=split.labels,
        pad_id=tokenizer.pad_token_id,
        padding_side=tokenizer.padding_side,
    )


def no_samples(tokenizer: Any) -> Encoded:
    """What a model's tokenizer makes of nothing."""
    none = np.zeros(0, dtype=np.int64)
    return Encoded(none, None, np.zeros(1, dtype=np.int64), none, tokenizer.pad_token_id, tokenizer.padding_side)


def collate(encoded: Encoded, indices: Sequence[int] | Indices) -> dict[str, Tensor]:
    """The batch of the samples at ``indices`` (N of them), padded to the longest.

    Returns int64 tensors (N, T): input_ids, attention_mask, token_type_ids where the model has them, position_ids where
    padding is on the left; and labels (N,).
    """
    chosen = np.asarray(indices, dtype=np.int64)
    if chosen.ndim != 1 or len(chosen) == 0:
        raise ValueError(f"indices: shape {chosen.shape}, wanted (N,) with N ≥ 1")
    starts, lengths = encoded.offsets[chosen], encoded.lengths[chosen]
    width = int(lengths.max())
    column = np.arange(width)
    shift = (width - lengths if encoded.padding_side == "left" else np.zeros_like(lengths))[:, None]
    present = (column >= shift) & (column < shift + lengths[:, None])
    source = (starts[:, None] + column - shift)[present]

    def padded(values: NDArray[np.int64], fill: int) -> Tensor:
        out = np.full(present.shape, fill, dtype=np.int64)
        out[present] = values[source]
        return torch.from_numpy(out)

    batch = {
        "input_ids": padded(encoded.tokens, encoded.pad_id),
        "attention_mask": torch.from_numpy(present.astype(np.int64)),
        "labels": torch.from_numpy(encoded.labels[chosen]),
    }
    if encoded.types is not None:
        batch["token_type_ids"] = padded(encoded.types, 0)
    if encoded.padding_side == "left":  # or a sample's positions would depend on its neighbours' lengths
        batch["position_ids"] = torch.from_numpy(np.maximum(column - shift, 0))
    return batch


def cut(indices: Sequence[int] | Indices, batch_size: int) -> list[Indices]:
    """``indices`` in pieces of ``batch_size``, in order; the last may be smaller."""
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size}, wanted batch_size ≥ 1")
    chosen = np.asarray(indices, dtype=np.int64)
    return [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]


def length_buckets(encoded: Encoded, batch_size: int, indices: Sequence[int] | Indices | None = None) -> Buckets:
    """Batches of samples sorted by length, longest first: little padding, and the largest batch is met at once.

    ``torch.cat(outputs)[buckets.inverse]`` is in the order of ``indices`` (None: all samples).
    """
    chosen = np.arange(len(encoded), dtype=np.int64) if indices is None else np.asarray(indices, dtype=np.int64)
    order = np.argsort(-encoded.lengths[chosen], kind="stable")
    return Buckets(cut(chosen[order], batch_size), np.argsort(order, kind="stable").astype(np.int64))


def _flat(samples: list[list[int]]) -> NDArray[np.int64]:
    return np.concatenate([np.asarray(sample, dtype=np.int64) for sample in samples])

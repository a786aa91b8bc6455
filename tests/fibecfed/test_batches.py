"""Batches: what a sample gives does not depend on its neighbours, its place, or the side of the padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2ForSequenceClassification

from fibecfed.batches import Encoded, collate, cut, encode, length_buckets
from fibecfed.data import Split

from .checkpoints import FIRST_WORD, tokenizer
from .tiny import CLASSES, VOCAB, base

LENGTHS = [3, 9, 1, 5, 9, 2]


def split(lengths: list[int] = LENGTHS, *, pairs: bool = False) -> Split:
    rng = np.random.default_rng(0)
    text = [" ".join(f"w{word}" for word in rng.integers(0, 40, length)) for length in lengths]
    labels = np.arange(len(lengths), dtype=np.int64) % CLASSES
    return Split(text, text[::-1] if pairs else None, labels, None)


def word_ids(text: str) -> list[int]:
    return [int(word[1:]) + FIRST_WORD for word in text.split()]


def test_encoded_samples_are_the_tokenizers() -> None:
    samples = split()
    encoded = encode(samples, tokenizer("bert"), 32)
    assert len(encoded) == 6
    for index in range(-6, 6):
        tokens, label = encoded[index]
        assert tokens.tolist() == [1, *word_ids(samples.text[index]), 2]
        assert label == samples.labels[index]
    np.testing.assert_array_equal(encoded.lengths, np.array(LENGTHS) + 2)
    with pytest.raises(IndexError, match="sample 6 of 6"):
        encoded[6]


def test_right_padded_batch_of_an_encoder() -> None:
    samples = split([3, 1], pairs=True)
    batch = collate(encode(samples, tokenizer("bert"), 32), [1, 0])
    first, second = word_ids(samples.text[0]), word_ids(samples.text[1])
    assert batch["input_ids"].tolist() == [[1, *second, 2, *first, 2], [1, *first, 2, *second, 2]]
    assert batch["token_type_ids"].tolist() == [[0] * 3 + [1] * 4, [0] * 5 + [1] * 2]
    single = collate(encode(split([3, 1]), tokenizer("bert"), 32), [0, 1, 1])
    assert single["input_ids"].tolist() == [[1, *first, 2], [1, *second, 2, 0, 0], [1, *second, 2, 0, 0]]
    assert single["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
    assert single["labels"].tolist() == [0, 1, 1]
    assert set(single) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert {tensor.dtype for tensor in single.values()} == {torch.int64}


def test_left_padded_batch_of_a_decoder_counts_positions_from_the_first_token() -> None:
    samples = split([3, 1])
    batch = collate(encode(samples, tokenizer("llama", side="left"), 32), [0, 1])
    assert batch["input_ids"].tolist() == [word_ids(samples.text[0]), [0, 0, *word_ids(samples.text[1])]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert "token_type_ids" not in batch


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_the_tokenizers_in_tokens_and_0_in_types(side: str) -> None:
    tokens, types, offsets = np.array([5, 6, 8]), np.array([1, 2, 3]), np.array([0, 2, 3])
    batch = collate(Encoded(tokens, types, offsets, np.array([1, 0]), 9, side), [0, 1])
    assert batch["input_ids"].tolist() == [[5, 6], [8, 9] if side == "right" else [9, 8]]
    assert batch["token_type_ids"].tolist() == [[1, 2], [3, 0] if side == "right" else [0, 3]]


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 99),
)
def test_every_token_is_in_its_batch_once(lengths: list[int], side: str, seed: int) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(1, offsets[-1] + 1)  # never the padding's 0
    encoded = Encoded(tokens, None, offsets, np.arange(len(lengths)), 0, side)
    chosen = np.random.default_rng(seed).permutation(len(lengths))[: max(1, len(lengths) - 2)]
    batch = collate(encoded, chosen)
    width = batch["input_ids"].shape[1]
    assert width == encoded.lengths[chosen].max()
    for ids, mask, index in zip(batch["input_ids"], batch["attention_mask"], chosen, strict=True):
        length = lengths[index]
        kept = slice(0, length) if side == "right" else slice(width - length, width)
        assert ids[kept].tolist() == encoded[index][0].tolist()
        assert ids.count_nonzero() == mask.sum() == mask[kept].sum() == length


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_a_samples_logits_do_not_depend_on_padding(kind: str, side: str) -> None:
    """Left padding shifts absolute positions (GPT-2) and the token a decoder classifies from, unless done right."""
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, num_labels=CLASSES
        )
        torch.manual_seed(1)
        model = GPT2ForSequenceClassification(config).eval()
    else:
        model = base(kind).eval()
    samples = split()
    if (kind, side) == ("bert", "left"):
        with pytest.raises(ValueError, match='padding_side is "left", wanted "right" for an encoder'):
            encode(samples, tokenizer(kind, side=side), 32)
        return
    encoded = encode(samples, tokenizer(kind, side=side), 32)
    alone = encode(samples, tokenizer(kind), 32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)  # at their initial scale all samples get nearly the same logits
        together = model(**collate(encoded, range(6))).logits
        single = torch.cat([model(**collate(alone, [index])).logits for index in range(6)])
    torch.testing.assert_close(together, single, rtol=1e-4, atol=1e-4)
    assert (single[0] - single[1]).abs().max() > 0.1  # a constant answer would pass the line above


def test_long_samples_are_cut_to_max_tokens() -> None:
    assert encode(split([20, 4]), tokenizer("bert"), 8).lengths.tolist() == [8, 6]
    assert encode(split([20, 4], pairs=True), tokenizer("bert"), 9).lengths.tolist() == [9, 9]
    assert encode(split([20, 4]), tokenizer("llama"), 8).lengths.tolist() == [8, 4]


def test_max_tokens_may_be_all_that_the_model_takes() -> None:
    assert encode(split([80, 4]), tokenizer("bert"), 64).lengths.tolist() == [64, 6]


def test_batches_keep_order_and_cover() -> None:
    pieces = cut(np.array([5, 3, 1, 0, 2]), 2)
    assert [piece.tolist() for piece in pieces] == [[5, 3], [1, 0], [2]]
    assert cut([], 4) == []
    with pytest.raises(ValueError, match="batch_size: 0, wanted"):
        cut([1], 0)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=30), batch_size=st.integers(1, 8), seed=st.integers(0, 9)
)
def test_buckets_are_sorted_by_length_and_their_inverse_restores_order(
    lengths: list[int], batch_size: int, seed: int
) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    encoded = Encoded(np.zeros(offsets[-1], dtype=np.int64), None, offsets, np.zeros(len(lengths), int), 0, "right")
    chosen = np.random.default_rng(seed).permutation(len(lengths))[: len(lengths) // 2 + 1]
    for indices in (None, chosen):
        buckets = length_buckets(encoded, batch_size, indices)
        flat = np.concatenate(buckets.batches)
        assert (np.diff(encoded.lengths[flat]) <= 0).all()
        assert {len(batch) for batch in buckets.batches[:-1]} <= {batch_size}
        np.testing.assert_array_equal(flat[buckets.inverse], np.arange(len(lengths)) if indices is None else chosen)


def test_what_cannot_be_tokenised_is_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens: 2, wanted more than the 2 special tokens"):
        encode(split(), tokenizer("bert"), 2)
    with pytest.raises(ValueError, match="max_tokens: 3, wanted more than the 3 special tokens"):
        encode(split(pairs=True), tokenizer("bert"), 3)
    with pytest.raises(ValueError, match=r"max_tokens: 65, wanted .* at most the model's 64"):
        encode(split(), tokenizer("llama"), 65)
    with pytest.raises(ValueError, match="no padding token"):
        encode(split(), tokenizer("llama", pad=False), 8)
    with pytest.raises(ValueError, match="split has no samples"):
        encode(split([]), tokenizer("llama"), 8)
    with pytest.raises(ValueError, match="sample 1 gives no token"):
        encode(Split(["w1", " "], None, np.array([0, 1]), None), tokenizer("llama"), 8)
    encoded = encode(split(), tokenizer("llama"), 8)
    for indices in ([], [[0]]):
        with pytest.raises(ValueError, match=r"indices: .*wanted"):
            collate(encoded, indices)

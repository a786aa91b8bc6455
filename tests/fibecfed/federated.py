"""A federation of three unequal devices around a tiny BERT, made by hand: no file is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fibecfed import FlatAdapter
from fibecfed.batches import encode
from fibecfed.client import Client, Device
from fibecfed.config import load_config
from fibecfed.data import Split, Task
from fibecfed.federation import Federation
from fibecfed.models import LoadedModel
from fibecfed.server import LocalStore, Server

from .checkpoints import WORDS, tokenizer
from .tiny import CLASSES, tiny

SIZES, TEST_SIZES = (12, 5, 8), (3, 6, 4)


def split(size: int, seed: int) -> Split:
    rng = np.random.default_rng(seed)
    text = [" ".join(WORDS[w] for w in rng.integers(0, 30, rng.integers(2, 9))) for _ in range(size)]
    return Split(text, None, rng.integers(0, CLASSES, size), None)


def pieces(sizes: tuple[int, ...], seed: int) -> list[np.ndarray]:
    order = np.random.default_rng(seed).permutation(sum(sizes))
    return [np.sort(piece) for piece in np.split(order, np.cumsum(sizes)[:-1])]


def federation(*overrides: str, **lora: Any) -> Federation:
    """Three devices with SIZES training and TEST_SIZES test samples of three classes; ``lora`` goes to LoraConfig."""
    task = Task("toy", split(sum(SIZES), 1), split(sum(TEST_SIZES), 2), ("a", "b", "c"))
    words, model = tokenizer("bert"), tiny("bert", **lora)
    parts = zip(pieces(SIZES, 3), pieces(TEST_SIZES, 4), strict=True)
    return Federation(
        config=load_config(None, ["train.batch_size=4", "device=cpu", *overrides]),
        task=task,
        loaded=LoadedModel(model, words, "tiny", ("query", "value"), "encoder"),
        flat=FlatAdapter(model),
        train=encode(task.train, words, 32),
        test=encode(task.test, words, 32),
        devices=[Device(k, train, test) for k, (train, test) in enumerate(parts)],
    )


def make_client(fed: Federation, gal: tuple[int, ...] = (2,)) -> Client:
    return Client(fed.flat, fed.train, fed.test, fed.config, gal)


def halves(fed: Federation, gal: tuple[int, ...] = (1,)) -> tuple[Server, LocalStore]:
    """Server and store of a federation in the middle of a run: every value of theirs is another random number."""
    server = Server(fed.flat, gal, fed.config.wire, fed.config.seed)
    residual = server.up.numel if fed.config.wire.error_feedback else 0
    store = LocalStore(fed.flat, gal, len(fed.devices), residual)
    server.values = torch.randn_like(server.values)
    store.rows.copy_(torch.randn_like(store.rows))
    return server, store


def buffer(fed: Federation, server: Server, local: torch.Tensor, gal: tuple[int, ...] = (1,)) -> torch.Tensor:
    """The flat buffer with GAL and head of the server and these local values."""
    flat, travelling, own = fed.flat, server.values.split(part_sizes(fed, gal)), local
    whole, start = torch.empty(flat.numel), 0
    for part, layer in zip(travelling, (*gal, None), strict=True):
        whole[flat.values(layer)] = part
    for layer in flat.layers:
        if layer not in gal:
            span = flat.values(layer)
            whole[span] = own[start : start + span.stop - span.start]
            start += span.stop - span.start
    return whole


def part_sizes(fed: Federation, gal: tuple[int, ...]) -> list[int]:
    return [fed.flat.values(layer).stop - fed.flat.values(layer).start for layer in (*gal, None)]

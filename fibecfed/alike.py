"""What all parts of a run must have alike, as digests: server and nodes, before and after an interruption. A run with
two kinds of a model would be wrong without a sign."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from .batches import Encoded
from .federation import Federation

SHOWN = 12  # hexadecimal digits of a digest in an error
# What tells tokenizers of the same vocabulary apart: case, accents, spaces, scripts, numbers, marks.
PROBES = ["A Naïve  café,\tisn't it?", "ÉCOLE ⅷ ﬁn 12,345.67 <s> [SEP] </s>", "日本語 Привет ελλ 🙂", "x" * 40]


def digests(fed: Federation, data: bool) -> dict[str, str]:
    """{what: SHA-256}: the frozen weights, the tokenizer; with ``data``, the samples as tokens and who has which."""
    found = {"base weights": weights(fed.loaded.model), "tokenizer": _tokenizer(fed.loaded.tokenizer)}
    if data:
        found["data"] = _data(fed)
    return found


def difference(wanted: dict[str, str], found: dict[str, str], whose: str) -> str:
    """What is not alike, in words; empty: nothing. ``wanted`` are those of ``whose``."""
    return ", ".join(
        f"other {what} than {whose} (SHA-256 {found.get(what, 'none')[:SHOWN]} …, wanted {digest[:SHOWN]} …)"
        for what, digest in wanted.items()
        if found.get(what) != digest
    )


def weights(model: torch.nn.Module) -> str:
    """The digest of what a checkpoint holds and training leaves alone. A fresh head is drawn on each machine, and
    travels."""
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def parts() -> Iterable[bytes | np.ndarray]:
        for name, tensor in sorted(model.state_dict().items()):
            if name not in learned and ".original_module." not in name:
                yield f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode()
                yield tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy()

    return _sha256(parts())


def _tokenizer(tokenizer: Any) -> str:
    """Of what it does and not of how it is written down, which differs between versions of its library."""
    vocabulary = tokenizer.get_vocab()
    known = " ".join(sorted(vocabulary)[:: max(1, len(vocabulary) // 200)])
    probes = [tokenizer(probe)["input_ids"] for probe in (*PROBES, known, known.upper())]
    described = {"vocabulary": vocabulary, "probes": probes}
    return _sha256([json.dumps(described, sort_keys=True).encode()])


def _data(fed: Federation) -> str:
    def encoded(split: Encoded) -> list[bytes | np.ndarray]:
        return [split.tokens, split.types if split.types is not None else b"", split.offsets, split.labels]

    parts = [own for device in fed.devices for own in (device.train, device.test)]
    names = json.dumps([list(fed.task.classes), [len(part) for part in parts]]).encode()
    return _sha256([names, *encoded(fed.train), *encoded(fed.test), *parts])


def _sha256(parts: Iterable[bytes | np.ndarray]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
    return digest.hexdigest()

"""Fisher scores and diagonal of one LoRA pair, ours and everyone else's, at the shapes of three models."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from .comparison import Comparison, Provider, Work, relative_error
from .fisher_peers import Found, make_pair, providers, truth

WIDTHS = {"MiniLM": 384, "RoBERTa-large": 1024, "LLaMA-7B": 4096}
RANKS, TOKENS, SAMPLES = (4, 8, 16, 64), (32, 128, 512, 2048), (1, 8, 32)
FEW = [  # (model, N, T, r)
    ("MiniLM", 32, 32, 8),
    ("RoBERTa-large", 8, 128, 8),
    ("RoBERTa-large", 32, 128, 8),
    ("RoBERTa-large", 8, 512, 64),
    ("LLaMA-7B", 8, 128, 8),
    ("LLaMA-7B", 8, 512, 8),
    ("LLaMA-7B", 1, 2048, 16),
]
ALL = [(model, n, t, r) for model in WIDTHS for n in SAMPLES for t in TOKENS for r in RANKS]
CPU_VALUES = 1 << 25  # of x: beyond, a comparison takes more than a minute on two cores
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # a peer may keep gradients in the dtype of its inputs


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    shapes = ALL if option("--shapes") == "all" else FEW
    if option("--on") == "cpu":
        shapes = [(model, n, t, r) for model, n, t, r in shapes if n * t * WIDTHS[model] <= CPU_VALUES]
    metafunc.parametrize("shape", shapes, ids=lambda s: f"{s[0]}-N{s[1]}-T{s[2]}-r{s[3]}")
    metafunc.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def test_lora_fisher_diag(
    compare: Comparison, device: torch.device, shape: tuple[str, int, int, int], dtype: torch.dtype
) -> None:
    model, samples, tokens, r = shape
    d = WIDTHS[model]
    pair = make_pair(samples, tokens, d, r, dtype, device)
    wanted = truth(pair)

    def error(found: Found) -> float:
        return relative_error(found, wanted[: len(found)])

    read = (pair.x, pair.h, pair.grad_h, pair.grad_y)
    moved = sum(t.numel() * t.element_size() for t in read) + 4 * (2 * d * r + 2 * samples)
    work = Work("fisher", f"{model} N={samples} T={tokens} r={r}", dtype, moved, 2 * samples * tokens * r * 2 * d)
    rows = compare(
        work, {name: Provider(partial(call, pair), error) for name, call in providers().items()}, TOLERANCES[dtype]
    )
    assert all(row.ms50 is not None for row in rows if row.provider.startswith("fibecfed")), "ours is wrong"

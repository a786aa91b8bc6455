"""Fisher scores and diagonal of one LoRA pair, ours and everyone else's, at the shapes of three models."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fibecfed_kernels import lora_fisher_diag

from . import fisher_peers
from .comparison import Comparison, Provider, Work, rehearsed, relative_error
from .fisher_peers import Found, Pair, make_pair, providers, truth

WIDTHS = {"MiniLM": 384, "RoBERTa-large": 1024, "LLaMA-7B": 4096}
RANKS, TOKENS, SAMPLES = (4, 8, 16, 64), (32, 128, 512, 2048), (1, 8, 32)
FEW = [  # (model, N, T, r)
    ("MiniLM", 1, 32, 16),
    ("MiniLM", 32, 32, 8),
    ("RoBERTa-large", 8, 128, 8),
    ("RoBERTa-large", 32, 128, 8),
    ("RoBERTa-large", 8, 512, 64),
    ("LLaMA-7B", 8, 128, 8),
    ("LLaMA-7B", 8, 512, 8),
    ("LLaMA-7B", 1, 2048, 16),
]
SMALL = [  # of these the dtypes are compared
    ("MiniLM", 1, 32, 8),
    ("MiniLM", 1, 128, 8),
    ("MiniLM", 8, 32, 8),
    ("RoBERTa-large", 1, 32, 4),
    ("RoBERTa-large", 1, 32, 16),
    ("RoBERTa-large", 1, 128, 16),
    ("RoBERTa-large", 8, 128, 8),
    ("LLaMA-7B", 8, 128, 8),
]
ALL = [(model, n, t, r) for model in WIDTHS for n in SAMPLES for t in TOKENS for r in RANKS]
CPU_VALUES = 1 << 25  # of x: beyond, a comparison takes more than a minute on two cores
PACKED_RANK = 8
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # a peer may keep gradients in the dtype of its inputs


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    shapes = ALL if option("--shapes") == "all" else FEW
    if option("--on") == "cpu":
        shapes = [(model, n, t, r) for model, n, t, r in shapes if n * t * WIDTHS[model] <= CPU_VALUES]
    metafunc.parametrize("shape", shapes, ids=lambda s: f"{s[0]}-N{s[1]}-T{s[2]}-r{s[3]}")
    metafunc.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def _error(found: Found, wanted: Found) -> float:
    return relative_error(found, wanted[: len(found)])


def _costs(pair: Pair) -> tuple[int, int]:
    """Bytes that are read and written at least, and the operations of the products."""
    (samples, tokens, d), r = pair.x.shape, pair.h.shape[-1]
    read = (pair.x, pair.h, pair.grad_h, pair.grad_y)
    moved = sum(t.numel() * t.element_size() for t in read) + 4 * (2 * d * r + 2 * samples)
    return moved, 2 * samples * tokens * r * 2 * d


def test_lora_fisher_diag(
    compare: Comparison, device: torch.device, shape: tuple[str, int, int, int], dtype: torch.dtype
) -> None:
    model, samples, tokens, r = shape
    d = WIDTHS[model]
    pair = make_pair(samples, tokens, d, r, dtype, device)
    error = partial(_error, wanted=truth(pair))
    work = Work("fisher", f"{model} N={samples} T={tokens} r={r}", dtype, *_costs(pair))
    little = make_pair(1, 2, 16, r, dtype, device)
    found = {name: Provider(partial(call, pair), error, partial(call, little)) for name, call in providers().items()}
    rows = compare(work, found, TOLERANCES[dtype])
    assert all(row.ms50 is not None for row in rows if row.provider.startswith("fibecfed")), "ours is wrong"


@pytest.mark.parametrize("small", SMALL, ids=lambda s: f"{s[0]}-N{s[1]}-T{s[2]}-r{s[3]}")
def test_dtypes(compare: Comparison, device: torch.device, small: tuple[str, int, int, int]) -> None:
    """Half precision moves half the bytes; where the work is small, reading it must not cost more than that saves."""
    model, samples, tokens, r = small
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pair = make_pair(samples, tokens, WIDTHS[model], r, dtype, device)
        error = partial(_error, wanted=truth(pair))
        little = partial(fisher_peers.ours, make_pair(1, 2, 16, r, dtype, device))
        name = f"fibecfed {str(dtype).removeprefix('torch.')}"
        found[name] = Provider(partial(fisher_peers.ours, pair), error, little)
    moved, _ = _costs(make_pair(samples, tokens, WIDTHS[model], r, torch.float32, device))
    compare(Work("fisher: dtypes", f"{model} N={samples} T={tokens} r={r}", torch.float32, moved), found, 1e-4)


def packed_providers(d: int, samples: int, longest: int, device: torch.device) -> tuple[dict[str, Provider], int]:
    """Of a batch with lengths like GLUE's, packed and padded; and its number of tokens."""
    lengths = torch.exp(3.0 + 0.6 * torch.randn(samples)).round().clamp(4, longest).int()
    lengths[0] = longest
    padded = make_pair(samples, longest, d, PACKED_RANK, torch.float32, device)
    real = (torch.arange(longest) < lengths[:, None]).to(device)
    for tensor in (padded.x, padded.grad_y):
        tensor[~real] = 0
    padded = Pair(padded.x, padded.x @ padded.a.T, padded.grad_y @ padded.b, padded.grad_y, padded.a, padded.b)
    packed = [t[real].contiguous() for t in (padded.x, padded.h, padded.grad_h, padded.grad_y)]
    offsets = torch.tensor([0, *lengths.tolist()]).cumsum(0, dtype=torch.int32).to(device)
    wanted = truth(padded)

    def ours() -> Found:
        found = lora_fisher_diag(*packed, offsets)
        return found.a.scores + found.b.scores, found.a.diag, found.b.diag

    def error(found: Found) -> float:
        return relative_error(found, wanted)

    found = {
        "fibecfed": Provider(ours, error),
        "fibecfed, padded": Provider(partial(fisher_peers.ours, padded), error),
        "bmm + square, padded": Provider(partial(fisher_peers.bmm, padded), error),
    }
    return found, int(lengths.sum())


@pytest.mark.parametrize("model", ["RoBERTa-large", "LLaMA-7B"])
def test_packed(compare: Comparison, device: torch.device, model: str) -> None:
    """The time of a batch whose padding is not stored should be that of its real tokens."""
    d, r, samples, longest = WIDTHS[model], PACKED_RANK, 32, 128
    found, tokens = packed_providers(d, samples, longest, device)
    little, _ = packed_providers(16, 2, 4, device)
    moved = 4 * (2 * tokens * (d + r) + 2 * d * r + 2 * samples)
    what = f"{model} N={samples} r={r}, {tokens / (samples * longest):.0%} real tokens of {samples} x {longest}"
    work = Work("fisher: packed", what, torch.float32, moved, 4 * tokens * r * d)
    compare(work, rehearsed(found, little), TOLERANCES[torch.float32])

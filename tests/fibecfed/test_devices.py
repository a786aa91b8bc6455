"""The package on the device that a model is on: the same as the reference bodies give on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fibecfed import FlatAdapter, MaskedAdamW, capture_fisher, dp_step, run, score_samples
from fibecfed_kernels import WirePlan, aggregate, use_backend

from .small_run import config
from .tiny import batch, tiny

CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])


def on(device: str, seed: int = 3) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch(seed=seed).items()}


def trained(device: str) -> tuple[FlatAdapter, Tensor]:
    """An adapter after three clipped steps of half of its rows inside captures, and the scores of the last batch."""
    model: Any = tiny().to(device)
    flat = FlatAdapter(model)
    optimizer = MaskedAdamW(flat, torch.arange(flat.num_rows) % 2 == 0, lr=1e-2, max_grad_norm=0.5)
    for seed in range(3):
        optimizer.zero_grad()
        with capture_fisher(model) as fisher:
            model(**on(device, seed)).loss.backward()
        optimizer.step()
    return flat, fisher.scores


@on_each_device
def test_steps_and_scores_are_those_of_the_reference(device: str) -> None:
    flat, scores = trained(device)
    with use_backend("reference"):
        wanted, wanted_scores = trained("cpu")
    assert flat.data.device.type == flat.grad.device.type == scores.device.type == device
    torch.testing.assert_close(flat.data.detach().cpu(), wanted.data.detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(scores.cpu(), wanted_scores, rtol=1e-3, atol=1e-6)


@on_each_device
def test_a_data_set_is_scored_where_its_batches_are(device: str) -> None:
    found = score_samples(tiny().to(device), [on(device, seed) for seed in range(2)]).scores
    with use_backend("reference"):
        wanted = score_samples(tiny(), [batch(seed=seed) for seed in range(2)]).scores
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-3, atol=1e-6)


@on_each_device
def test_a_clipped_step_is_that_of_the_reference(device: str) -> None:
    def stepped(device: str) -> list[Tensor]:
        model: Any = tiny().to(device)
        parameters = [p for p in model.parameters() if p.requires_grad]
        generator = torch.Generator(device).manual_seed(0)
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for noise in (0.0, 1e-9):  # what is drawn differs between devices
            dp_step(
                model, on(device), optimizer, max_norm=0.1, noise_multiplier=noise, expected_batch_size=5,
                generator=generator,
            )  # fmt: skip
        return [p.detach().cpu() for p in parameters]

    with use_backend("reference"):
        truth = stepped("cpu")
    for found, wanted in zip(stepped(device), truth, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@on_each_device
def test_a_gradient_scaler_is_applied_in_the_step_and_skips_what_overflowed(device: str) -> None:
    model: Any = tiny().to(device)
    flat = FlatAdapter(model)
    optimizer, scaler = MaskedAdamW(flat, lr=1e-2), torch.amp.GradScaler(device, init_scale=8.0)
    before = flat.data.detach().clone()
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(**on(device)).loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(flat.data.detach(), before) == (factor > 1.0)
    assert optimizer.state[flat.data]["step"].max() == 1


@on_each_device
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_messages_go_from_device_to_device(device: str, dtype: Any) -> None:
    flat, _ = trained(device)
    other = FlatAdapter(nn.Module.cpu(tiny()))  # type: ignore[arg-type]
    plan = WirePlan(flat, dtype=dtype)
    message = plan.pack(flat, round=1, num_samples=3)
    WirePlan(other, dtype=dtype).load(message, other, round=1)
    mean = aggregate(plan, [message, message], round=1, device=device)
    assert mean.device.type == device
    assert torch.equal(plan.gather(other), mean.cpu())
    plan.load(message, flat, round=1)
    assert torch.equal(plan.gather(flat).cpu(), mean.cpu())


@on_each_device
def test_a_run_ends_with_a_record(device: str, sources: tuple[Path, Path], tmp_path: Path) -> None:
    record = run(config(sources, tmp_path, f"device={device}"))
    assert record.end is not None
    assert [found.round for found in record.rounds] == [1, 2, 3]
    assert all(0 < found.loss < 10 for found in record.rounds)

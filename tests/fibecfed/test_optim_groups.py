"""LoRA+ learning rates, masks that change in the middle, and states loaded beside another mask."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fibecfed import FlatAdapter, MaskedAdamW, MaskedSGD
from tests.fibecfed.rows import TorchRows, assert_same, gradients, pair, snapshot, some_rows
from tests.fibecfed.test_optim_clipping import kinds
from tests.fibecfed.tiny import batch, tiny


@pytest.mark.parametrize(
    ("kind", "lr", "options"),
    [
        ("adamw", 1e-3, {"weight_decay": 0.1, "eps": 1e-3}),
        ("sgd", 1e-2, {"weight_decay": 0.1}),
        ("sgd", 1e-2, {"momentum": 0.9, "nesterov": True}),
    ],
    ids=["adamw", "sgd", "nesterov"],
)
def test_lora_plus_trains_as_two_groups_of_torch_under_a_scheduler(
    kind: str, lr: float, options: dict[str, Any]
) -> None:
    ours, theirs = tiny(), tiny()
    flat = FlatAdapter(ours)
    named = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for name, p in named.items() if "lora_B" not in name], "lr": lr},
        {"params": [p for name, p in named.items() if "lora_B" in name], "lr": 16 * lr},
    ]
    assert all(group["params"] for group in groups)
    torchs = (torch.optim.AdamW if kind == "adamw" else torch.optim.SGD)(groups, **options)
    mine = (MaskedAdamW if kind == "adamw" else MaskedSGD)(flat, lr=lr, loraplus_lr_ratio=16.0, **options)
    for model, optimizer in ((ours, mine), (theirs, torchs)):
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
        for seed in range(8):
            optimizer.zero_grad()
            model(**batch(seed=seed)).loss.backward()
            optimizer.step()
            scheduler.step()
    moved = 0.0
    for entry, parameter in flat.named_views():
        torch.testing.assert_close(parameter, named[entry.name], rtol=1e-4, atol=1e-6)
        moved = max(moved, float((parameter - dict(tiny().named_parameters())[entry.name]).detach().abs().max()))
    assert moved > 1e-3


def test_rows_of_lora_b_and_no_others_learn_faster() -> None:
    flat = pair()
    optimizer = MaskedSGD(flat, lr=0.5, loraplus_lr_ratio=4.0)
    flat.grad.fill_(1.0)
    for ratio in (4.0, 0.25, 1.0, 4.0):
        optimizer.param_groups[0]["loraplus_lr_ratio"] = ratio
        before = flat.data.detach().clone()
        optimizer.step()
        change = before - flat.data.detach()
        for entry in flat.entries:
            rate = 0.5 * ratio if entry.name.split(".")[0] in ("lora_B", "lora_embedding_B") else 0.5
            span = slice(entry.offset, entry.offset + entry.numel)
            torch.testing.assert_close(change[span], torch.full((entry.numel,), rate))


@kinds
def test_lora_plus_with_masks_that_change_is_every_rows_own_torch_optimizer(
    ours: Any, torchs: type[torch.optim.Optimizer], hyper: dict[str, Any]
) -> None:
    flat = pair()
    mine, truth = ours(flat, loraplus_lr_ratio=4.0, **hyper), TorchRows(flat, torchs, **hyper)
    names = [flat.entries[i].name.split(".")[0] for i in flat.table.parameter.tolist()]
    for name, optimizer in zip(names, truth.optimizers, strict=True):
        optimizer.param_groups[0]["lr"] *= 4.0 if name in ("lora_B", "lora_embedding_B") else 1.0
    for k, grad in enumerate(gradients(flat, 9)):
        mine.set_mask(some_rows(flat, seed=k))
        flat.grad.copy_(grad)
        mine.step()
        truth.step(grad, mine.mask)
    torch.testing.assert_close(flat.data.detach(), truth.values(), rtol=1e-5, atol=1e-7)


@kinds
def test_masks_that_change_keep_every_rows_own_moments_decay_and_step_count(
    ours: Any, torchs: type[torch.optim.Optimizer], hyper: dict[str, Any]
) -> None:
    flat = pair()
    mine, truth = ours(flat, some_rows(flat), **hyper), TorchRows(flat, torchs, **hyper)
    steps = torch.zeros(flat.num_rows, dtype=torch.int32)
    for k, grad in enumerate(gradients(flat, 9)):
        mine.set_mask(some_rows(flat, seed=k // 2))
        before = snapshot(flat, mine) if k else {}
        flat.grad.copy_(grad)
        mine.step()
        truth.step(grad, mine.mask)
        steps += mine.mask
        still = ~mine.mask.repeat_interleave(flat.row_lengths)
        for name, tensor in before.items():
            frozen = ~mine.mask if name == "step" else still
            assert torch.equal(snapshot(flat, mine)[name][frozen], tensor[frozen]), name
    assert torch.equal(mine.state[flat.data]["step"], steps)
    torch.testing.assert_close(flat.data.detach(), truth.values(), rtol=1e-5, atol=1e-7)


@kinds
def test_a_state_loaded_beside_another_mask_brings_its_own_which_may_be_set_again(
    ours: Any, torchs: type[torch.optim.Optimizer], hyper: dict[str, Any]
) -> None:
    flat, other = pair(), pair()
    options = {"max_grad_norm": 1.0, "loraplus_lr_ratio": 4.0}
    mine = ours(flat, some_rows(flat, 1), **hyper, **options)
    grads = gradients(flat, 6)
    for grad in grads[:3]:
        flat.grad.copy_(grad)
        mine.step()
    other.copy_(flat.data.detach())
    wanted = some_rows(other, 2)
    loaded = ours(other, wanted, lr=5.0)
    loaded.load_state_dict(copy.deepcopy(mine.state_dict()))
    assert torch.equal(loaded.mask, mine.mask)
    assert {key: loaded.param_groups[0][key] for key in options} == options
    for optimizer in (mine, loaded):
        optimizer.set_mask(wanted)
    for grad in grads[3:]:
        for f, optimizer in ((flat, mine), (other, loaded)):
            f.grad.copy_(grad)
            optimizer.step()
    assert_same(snapshot(other, loaded), snapshot(flat, mine))
    assert torch.equal(loaded.state[other.data]["step"], 3 * some_rows(flat, 1).int() + 3 * wanted.int())


@kinds
def test_a_state_from_before_the_options_goes_on_without_them(
    ours: Any, torchs: type[torch.optim.Optimizer], hyper: dict[str, Any]
) -> None:
    flat, other = pair(), pair()
    mine = ours(flat, **hyper)
    grads = gradients(flat, 4)
    for grad in grads[:2]:
        flat.grad.copy_(grad)
        mine.step()
    old = copy.deepcopy(mine.state_dict())
    for key in ("max_grad_norm", "loraplus_lr_ratio"):
        del old["param_groups"][0][key]
    other.copy_(flat.data.detach())
    loaded = ours(other, max_grad_norm=1e-3, loraplus_lr_ratio=9.0, **hyper)
    loaded.load_state_dict(old)
    assert "max_grad_norm" not in old["param_groups"][0], "the caller's dictionary was changed"
    for grad in grads[2:]:
        for f, optimizer in ((flat, mine), (other, loaded)):
            f.grad.copy_(grad)
            optimizer.step()
    assert_same(snapshot(other, loaded), snapshot(flat, mine))


@pytest.mark.parametrize("kind", [MaskedAdamW, MaskedSGD])
def test_what_is_no_ratio_is_refused_by_name_and_changes_nothing(kind: type[MaskedAdamW | MaskedSGD]) -> None:
    flat = pair()
    for value in (0.0, -16.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"loraplus_lr_ratio: {value}, wanted"):
            kind(flat, loraplus_lr_ratio=value)
    with pytest.raises(TypeError, match="loraplus_lr_ratio: 'fast', wanted a number"):
        kind(flat, loraplus_lr_ratio="fast")  # type: ignore[arg-type]
    optimizer = kind(flat, loraplus_lr_ratio=2.0)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0] |= {"lr": 7.0, "loraplus_lr_ratio": -1.0}
    with pytest.raises(ValueError, match=r"loraplus_lr_ratio: -1\.0"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_a_ratio_without_a_lora_b_to_learn_by_it_is_refused() -> None:
    flat = FlatAdapter(nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(ValueError, match=r"loraplus_lr_ratio: 16\.0, wanted 1: the flat adapter has no LoRA B matrix"):
        MaskedAdamW(flat, loraplus_lr_ratio=16.0)
    flat.grad.fill_(1.0)
    MaskedAdamW(flat, loraplus_lr_ratio=1.0).step()

"""max_grad_norm: torch's clipping of the active rows alone, inside the step."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from fibecfed import FlatAdapter, MaskedAdamW, MaskedSGD
from tests.fibecfed.rows import TorchRows, assert_same, gradients, pair, snapshot, some_rows
from tests.fibecfed.tiny import batch, tiny

KINDS: list[tuple[type[MaskedAdamW | MaskedSGD], type[torch.optim.Optimizer], dict[str, Any]]] = [
    (MaskedAdamW, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-2}),
    (MaskedSGD, torch.optim.SGD, {"lr": 0.1}),
    (MaskedSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (MaskedSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
]
kinds = pytest.mark.parametrize(("ours", "torchs", "hyper"), KINDS, ids=["adamw", "sgd", "nesterov", "dampening"])


@kinds
@pytest.mark.parametrize("changing", [False, True], ids=["one mask", "masks that change"])
def test_steps_are_torchs_on_the_active_rows_clipped_together(
    ours: Any, torchs: type[torch.optim.Optimizer], hyper: dict[str, Any], changing: bool
) -> None:
    flat = pair()
    mine, truth = ours(flat, some_rows(flat), max_grad_norm=1.0, **hyper), TorchRows(flat, torchs, **hyper)
    clipped = []
    for k, grad in enumerate(gradients(flat, 9)):
        if changing:
            mine.set_mask(some_rows(flat, seed=k))
        inactive = ~mine.mask.repeat_interleave(flat.row_lengths)
        flat.grad.copy_(grad.masked_fill(inactive, torch.nan))
        before = flat.grad.clone()
        norm = truth.step(grad, mine.mask, 1.0)
        assert norm is not None
        mine.step()
        assert torch.equal(flat.grad.nan_to_num(), before.nan_to_num()), "the gradients were changed"
        torch.testing.assert_close(mine.grad_norm, norm, rtol=1e-6, atol=0.0)
        clipped.append(bool(norm > 1.0))
    assert any(clipped)
    assert not all(clipped)
    torch.testing.assert_close(flat.data.detach(), truth.values(), rtol=1e-5, atol=1e-7)


def test_a_model_trains_as_with_torchs_clipping() -> None:
    ours, theirs = tiny(), tiny()
    flat = FlatAdapter(ours)
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    mine = MaskedAdamW(flat, lr=1e-2, eps=1e-3, max_grad_norm=0.1)
    torchs = torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3)
    for seed in range(5):
        for model, optimizer in ((ours, mine), (theirs, torchs)):
            optimizer.zero_grad()
            model(**batch(seed=seed)).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.1)
        assert norm > 0.1
        mine.step()
        torchs.step()
        torch.testing.assert_close(mine.grad_norm, norm, rtol=1e-4, atol=0.0)
    named = dict(theirs.named_parameters())
    for entry, parameter in flat.named_views():
        torch.testing.assert_close(parameter, named[entry.name], rtol=1e-4, atol=1e-6)


def test_the_norm_is_none_before_the_first_step_and_without_clipping() -> None:
    flat = pair()
    clipping, plain = MaskedSGD(flat, max_grad_norm=float("inf")), MaskedSGD(flat)
    assert clipping.grad_norm is None
    (grad,) = gradients(flat, 1)
    flat.grad.copy_(grad)
    before = flat.data.detach().clone()
    clipping.step()
    assert clipping.grad_norm is not None
    torch.testing.assert_close(clipping.grad_norm, grad.norm())
    assert torch.equal(flat.data, before.add(grad, alpha=-1e-3)), "an infinite norm clips nothing"
    plain.step()
    assert plain.grad_norm is None


@kinds
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_norm_that_is_not_finite_is_refused_by_name_and_changes_nothing(
    ours: Any, torchs: type[torch.optim.Optimizer], hyper: dict[str, Any], steps: int, value: float
) -> None:
    flat = pair()
    mine = ours(flat, max_grad_norm=1.0, **hyper)
    for grad in gradients(flat, steps):
        flat.grad.copy_(grad)
        mine.step()
    before, norm = snapshot(flat, mine), mine.grad_norm
    flat.grad.fill_(1.0)
    b = next(entry for entry in flat.entries if entry.name == "lora_B.default.weight")
    flat.grad[[b.offset + 3 * 2 + 1, b.offset + 3 * 4]] = value
    words = r"max_grad_norm: the norm .* is (nan|inf): not finite in 2 rows, lora_B.default.weight \(rows 2, 4\)$"
    with pytest.raises(FloatingPointError, match=words):
        mine.step()
    assert_same(snapshot(flat, mine), before)
    assert mine.grad_norm is norm
    mine.set_mask((flat.table.parameter != flat.entries.index(b)) | (flat.table.row % 2 == 1))
    mine.step()  # the rows that are not finite are not active any more


def test_an_error_names_a_few_of_many_places() -> None:
    flat = pair()
    flat.grad.fill_(torch.nan)
    with pytest.raises(FloatingPointError) as error:
        MaskedSGD(flat, max_grad_norm=1.0).step()
    assert f"not finite in {flat.num_rows} rows, lora_" in str(error.value)
    assert str(error.value).count("(rows ") == 3
    assert "lora_B.default.weight (rows 0, 1, 2, 3, 4)" in str(error.value)
    mask = torch.zeros(flat.num_rows, dtype=torch.bool)
    mask[flat.table.parameter == [entry.name for entry in flat.entries].index("lora_embedding_B.default")] = True
    with pytest.raises(
        FloatingPointError, match=r"not finite in 6 rows, lora_embedding_B.default \(rows 0, 1, 2, 3, 4, …\)$"
    ):
        MaskedSGD(flat, mask, max_grad_norm=1.0).step()


def test_finite_gradients_with_a_norm_past_float32_are_refused() -> None:
    flat = pair()
    flat.grad.fill_(3e38)
    with pytest.raises(FloatingPointError, match="the norm of the gradients is inf: more than float32 can hold"):
        MaskedSGD(flat, max_grad_norm=1.0).step()


@pytest.mark.parametrize("kind", [MaskedAdamW, MaskedSGD])
def test_what_is_no_norm_is_refused_by_name(kind: type[MaskedAdamW | MaskedSGD]) -> None:
    flat = pair()
    for value in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"max_grad_norm: {value}, wanted max_grad_norm > 0"):
            kind(flat, max_grad_norm=value)
    with pytest.raises(TypeError, match="max_grad_norm: 'large', wanted a number"):
        kind(flat, max_grad_norm="large")  # type: ignore[arg-type]
    optimizer = kind(flat)
    optimizer.param_groups[0]["max_grad_norm"] = -2.0
    with pytest.raises(ValueError, match=r"max_grad_norm: -2\.0"):
        optimizer.step()


# -- torch.amp.GradScaler ----------------------------------------------------------------------------------------------


def scaled(flat: FlatAdapter, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, grad: torch.Tensor):  # type: ignore[no-untyped-def]
    """The gradients that a backward pass of a scaled loss leaves."""
    flat.grad.copy_(scaler.scale(grad))


def test_a_grad_scaler_steps_as_without_a_scale_whether_or_not_it_unscaled_before() -> None:
    for (ours, _, hyper), clips, unscales in itertools.product(KINDS, (None, 1.0), (False, True)):
        flat, other = pair(), pair()
        mask = some_rows(flat)
        mine, plain = (ours(f, mask, max_grad_norm=clips, **hyper) for f in (flat, other))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        for grad in gradients(flat, 6):
            scaled(flat, mine, scaler, grad)
            if unscales:
                scaler.unscale_(mine)
            before = flat.grad.clone()
            scaler.step(mine)
            scaler.update()
            assert torch.equal(flat.grad, before), "the gradients were changed"
            other.grad.copy_(grad)
            plain.step()
            if clips is not None:
                torch.testing.assert_close(mine.grad_norm, plain.grad_norm, rtol=1e-6, atol=0.0)
        assert scaler.get_scale() == 2.0**13
        torch.testing.assert_close(flat.data, other.data, rtol=1e-6, atol=1e-7)
        assert torch.equal(mine.state[flat.data]["step"], plain.state[other.data]["step"])


def test_a_grad_scaler_steps_as_torchs_own_optimizer() -> None:
    flat = pair()
    parameter = torch.nn.Parameter(flat.data.detach().clone())
    hyper: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3}
    mine, torchs = MaskedAdamW(flat, max_grad_norm=1.0, **hyper), torch.optim.AdamW([parameter], **hyper)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) for _ in range(2)]
    for k, grad in enumerate(gradients(flat, 8)):
        grad[5] = torch.inf if k == 3 else grad[5]
        flat.grad.copy_(scalers[0].scale(grad))
        parameter.grad = scalers[1].scale(grad)
        scalers[0].step(mine)
        scalers[1].unscale_(torchs)
        torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        scalers[1].step(torchs)
        for scaler in scalers:
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert mine.state[flat.data]["step"].unique().tolist() == [7]
    torch.testing.assert_close(flat.data, parameter, rtol=1e-5, atol=1e-7)


@kinds
@pytest.mark.parametrize("clips", [None, 1.0])
@pytest.mark.parametrize("unscales", [False, True])
def test_an_overflow_changes_nothing_whatever_row_it_is_in(
    ours: Any, torchs: type[torch.optim.Optimizer], hyper: dict[str, Any], clips: float | None, unscales: bool
) -> None:
    flat = pair()
    mask = some_rows(flat)
    mine = ours(flat, mask, max_grad_norm=clips, **hyper)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    first, *rest = gradients(flat, 5)
    scaled(flat, mine, scaler, first)
    scaler.step(mine)
    scaler.update()
    before, norm = snapshot(flat, mine), mine.grad_norm
    active = mask.repeat_interleave(flat.row_lengths)
    for place, value in ((int(active.nonzero()[0]), torch.inf), (int((~active).nonzero()[0]), torch.nan)):
        scaled(flat, mine, scaler, rest[0])
        flat.grad[place] = value
        if unscales:
            scaler.unscale_(mine)
        scaler.step(mine)
        scale = scaler.get_scale()
        scaler.update()
        assert scaler.get_scale() == scale / 2
        assert_same(snapshot(flat, mine), before)
        assert mine.grad_norm is norm
    scaled(flat, mine, scaler, rest[1])
    scaler.step(mine)
    assert torch.equal(mine.state[flat.data]["step"], 2 * mask.int())
    assert not hasattr(mine, "found_inf")

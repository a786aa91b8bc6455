"""MaskedAdamW and MaskedSGD as torch optimizers on a real adapter."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fibecfed import BrokenViewsError, FlatAdapter, MaskedAdamW, MaskedSGD
from tests.fibecfed.tiny import batch, tiny


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int, scheduler: Any = None) -> None:
    for i in range(steps):
        optimizer.zero_grad()
        model(**batch(seed=i)).loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("adamw", {"weight_decay": 0.1}),
        ("adamw", {"betas": (0.5, 0.9), "eps": 1e-2}),
        ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        ("sgd", {"momentum": 0.9, "dampening": 0.5}),
        ("sgd", {}),
    ],
    ids=["adamw", "adamw-eps", "nesterov", "dampening", "sgd"],
)
def test_all_rows_active_trains_as_torch_does_with_a_scheduler(kind: str, options: dict[str, Any]) -> None:
    ours, theirs = tiny(), tiny()
    flat = FlatAdapter(ours)
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    if kind == "adamw":
        mine: torch.optim.Optimizer = MaskedAdamW(flat, lr=1e-2, **options)
        reference: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=1e-2, **options)
    else:
        mine = MaskedSGD(flat, lr=1e-2, **options)
        reference = torch.optim.SGD(parameters, lr=1e-2, **options)
    for model, optimizer in ((ours, mine), (theirs, reference)):
        train(model, optimizer, 10, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10))
    named = dict(theirs.named_parameters())
    for entry, parameter in flat.named_views():
        torch.testing.assert_close(parameter, named[entry.name], rtol=1e-4, atol=1e-6)


def test_defaults_are_torchs() -> None:
    flat, parameter = FlatAdapter(tiny()), torch.nn.Parameter(torch.zeros(1))
    for mine, reference in (
        (MaskedAdamW(flat), torch.optim.AdamW([parameter])),
        (MaskedSGD(flat), torch.optim.SGD([parameter])),
    ):
        own = {name: value for name, value in mine.defaults.items() if name in reference.defaults}
        assert own == {name: reference.defaults[name] for name in own}


def test_the_state_is_named_as_torch_names_it() -> None:
    model = tiny()
    flat = FlatAdapter(model)
    adamw, sgd, momentum = MaskedAdamW(flat, lr=1e-3), MaskedSGD(flat, lr=1e-3), MaskedSGD(flat, lr=1e-3, momentum=0.9)
    train(model, adamw, 1)
    state = adamw.state[flat.data]
    torch.testing.assert_close(state["exp_avg"], 0.1 * flat.grad)
    torch.testing.assert_close(state["exp_avg_sq"], 1e-3 * flat.grad.square())
    train(model, sgd, 1)
    assert set(sgd.state[flat.data]) == {"step"}
    train(model, momentum, 1)
    assert set(momentum.state[flat.data]) == {"step", "momentum_buffer"}


def test_momentum_may_be_switched_on_later_and_off_again() -> None:
    ours, theirs = tiny(), tiny()
    flat = FlatAdapter(ours)
    mine = MaskedSGD(flat, lr=0.1)
    reference = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.1)
    for momentum in (0.0, 0.9, 0.0):
        for model, optimizer in ((ours, mine), (theirs, reference)):
            optimizer.param_groups[0]["momentum"] = momentum
            train(model, optimizer, 2)
        mine.load_state_dict(mine.state_dict())
    named = dict(theirs.named_parameters())
    for entry, parameter in flat.named_views():
        torch.testing.assert_close(parameter, named[entry.name], rtol=1e-4, atol=1e-6)


def half_mask(flat: FlatAdapter) -> torch.Tensor:
    mask = torch.zeros(flat.num_rows, dtype=torch.bool)
    mask[::2] = True
    return mask


def test_inactive_rows_stand_still_and_active_ones_move() -> None:
    model = tiny()
    flat = FlatAdapter(model)
    mask = half_mask(flat)
    optimizer = MaskedAdamW(flat, mask, lr=1e-2, weight_decay=0.1)
    before = flat.data.detach().clone()
    train(model, optimizer, 3)
    active = mask.repeat_interleave(flat.row_lengths)
    assert torch.equal(flat.data.detach()[~active], before[~active])
    assert (flat.data.detach()[active] != before[active]).float().mean() > 0.99
    state = optimizer.state[flat.data]
    assert state["exp_avg"][~active].abs().max() == 0
    assert state["step"].tolist() == (3 * mask.int()).tolist()


def test_state_dict_resumes_bit_for_bit_with_its_mask() -> None:
    model, twin = tiny(), tiny()
    flat, other = FlatAdapter(model), FlatAdapter(twin)
    optimizer = MaskedAdamW(flat, half_mask(flat), lr=1e-2)
    train(model, optimizer, 3)
    other.copy_(flat.data.detach())
    resumed = MaskedAdamW(other, lr=5.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(resumed.mask, optimizer.mask)
    assert resumed.state[other.data]["step"].dtype == torch.int32
    train(model, optimizer, 2)
    train(twin, resumed, 2)
    assert torch.equal(other.data, flat.data)


def test_a_changed_mask_keeps_every_rows_own_step_count() -> None:
    model = tiny()
    flat = FlatAdapter(model)
    mask = half_mask(flat)
    optimizer = MaskedAdamW(flat, mask)
    train(model, optimizer, 2)
    optimizer.set_mask(~mask)
    train(model, optimizer, 1)
    assert optimizer.state[flat.data]["step"].tolist() == torch.where(mask, 2, 1).tolist()


def test_a_mask_is_the_optimizers_own() -> None:
    model = tiny()
    flat = FlatAdapter(model)
    mask = half_mask(flat)
    optimizer = MaskedAdamW(flat, mask)
    wanted = mask.clone()
    mask.fill_(True)
    assert torch.equal(optimizer.mask, wanted)


def test_a_state_of_another_adapter_is_refused_by_name_and_changes_nothing() -> None:
    model = tiny()
    flat = FlatAdapter(model)
    optimizer = MaskedAdamW(flat)
    train(model, optimizer, 1)
    for name in ("exp_avg", "exp_avg_sq", "step"):
        state = copy.deepcopy(optimizer.state_dict())
        state["state"][0][name] = torch.zeros(3)
        with pytest.raises(ValueError, match=f"state_dict: {name} holds 3 values"):
            optimizer.load_state_dict(state)
        assert optimizer.state[flat.data][name].numel() > 3
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["mask"] = torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask"):
        optimizer.load_state_dict(state)


def test_grad_scaler_unscales_and_skips_overflow() -> None:
    model = tiny()
    flat = FlatAdapter(model)
    optimizer = MaskedSGD(flat, lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    model(**batch()).loss.backward()
    plain = flat.grad.clone()
    optimizer.zero_grad()
    before = flat.data.detach().clone()
    scaler.scale(model(**batch()).loss).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(flat.data.detach(), before - plain, rtol=1e-5, atol=1e-7)
    before = flat.data.detach().clone()
    scaler.scale(model(**batch()).loss).backward()
    flat.grad[0] = float("inf")
    scaler.step(optimizer)
    assert torch.equal(flat.data, before)


def test_step_refuses_broken_views() -> None:
    model = tiny()
    optimizer = MaskedAdamW(FlatAdapter(model))
    model.double()
    with pytest.raises(BrokenViewsError):
        optimizer.step()


def test_a_closure_is_run_with_gradients() -> None:
    model = tiny()
    optimizer = MaskedSGD(FlatAdapter(model), lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        return float(loss)

    assert optimizer.step(closure) == pytest.approx(float(tiny()(**batch()).loss))


def test_bad_arguments_are_refused_by_name() -> None:
    model = tiny()
    flat = FlatAdapter(model)
    with pytest.raises(ValueError, match="mask"):
        MaskedAdamW(flat, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask: torch.int64"):
        MaskedAdamW(flat, torch.ones(flat.num_rows, dtype=torch.int64))
    with pytest.raises(TypeError, match="flat"):
        MaskedAdamW(model)  # type: ignore[arg-type]
    trained, other = MaskedAdamW(flat), MaskedAdamW(FlatAdapter(tiny(r=5)))
    train(model, trained, 1)
    with pytest.raises(ValueError, match="state_dict"):
        other.load_state_dict(trained.state_dict())
    with pytest.raises(TypeError, match=r"mask: list, wanted a torch.bool tensor"):
        trained.set_mask([True] * flat.num_rows)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"betas\[0\]"):
        MaskedAdamW(flat, betas=(1.0, 0.9))
    with pytest.raises(ValueError, match="lr: -1"):
        MaskedAdamW(flat, lr=-1)
    with pytest.raises(ValueError, match="nesterov"):
        MaskedSGD(flat, lr=0.1, nesterov=True)
    trained.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr: -1"):
        trained.step()


def test_other_parameters_are_refused() -> None:
    optimizer = MaskedAdamW(FlatAdapter(tiny()))
    with pytest.raises(ValueError, match="param_group: a masked optimizer steps the parameters of its flat adapter"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    assert len(optimizer.param_groups) == 1


def test_a_state_of_another_optimizer_is_refused_and_changes_nothing() -> None:
    model = tiny()
    flat = FlatAdapter(model)
    adamw, sgd = MaskedAdamW(flat), MaskedSGD(flat, lr=0.1, momentum=0.9)
    for optimizer in (adamw, sgd):
        train(model, optimizer, 1)
    plain = torch.optim.AdamW([torch.nn.Parameter(flat.data.detach().clone())]).state_dict()
    cut = adamw.state_dict()
    cut["param_groups"][0]["mask"] = torch.ones(3, dtype=torch.bool)
    halved = adamw.state_dict()
    halved["state"] = {0: {"step": halved["state"][0]["step"]}}
    for bad in (sgd.state_dict(), plain, {}, None, cut, halved):
        with pytest.raises(ValueError, match=r"state_dict|mask"):
            adamw.load_state_dict(bad)  # type: ignore[arg-type]
    assert adamw.mask.shape == (flat.num_rows,)
    assert adamw.state[flat.data]["step"].max() == 1
    for _ in range(2):  # torch adds to its defaults when it loads
        adamw.load_state_dict(adamw.state_dict())
    train(model, adamw, 1)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_copy_is_refused(copied: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match="MaskedSGD cannot be copied or pickled: it belongs to its FlatAdapter"):
        copied(MaskedSGD(FlatAdapter(tiny())))


def test_step_counts_come_to_the_adapters_device_and_are_counts() -> None:
    """torch leaves a state called "step" where it was saved; Trainer loads a checkpoint to the CPU."""
    optimizer = MaskedAdamW(FlatAdapter(tiny()))
    optimizer.flat.grad.fill_(1.0)
    optimizer.step()
    moved: list[object] = []

    class Elsewhere(torch.Tensor):
        def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            moved.append(args[0])
            return super().to(*args, **kwargs).as_subclass(torch.Tensor)

    state = optimizer.state_dict()
    state["state"] = {0: {**state["state"][0], "step": state["state"][0]["step"].as_subclass(Elsewhere)}}
    optimizer.load_state_dict(state)
    assert optimizer.flat.data.device in moved
    for dtype in (torch.int64, torch.float32):
        bad = copy.deepcopy(optimizer.state_dict())
        bad["state"][0]["step"] = bad["state"][0]["step"].to(dtype)
        with pytest.raises(ValueError, match=rf"state_dict: step is {dtype}, wanted torch.int32"):
            optimizer.load_state_dict(bad)

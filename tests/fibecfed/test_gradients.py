"""Gradients come into the flat buffer whatever a training loop does: dropped, assigned, accumulated, scaled, frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from fibecfed import BrokenViewsError, FlatAdapter, MaskedAdamW, MaskedSGD, capture_fisher
from fibecfed_kernels import WirePlan
from tests.fibecfed.tiny import batch, tiny

LR, DECAY = 1e-2, 0.1
Loop = Callable[[nn.Module, Any], None]


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def backward(model: nn.Module, seed: int) -> None:
    model(**batch(seed=seed)).loss.backward()


def dropped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for seed in range(3):
        model.zero_grad()
        backward(model, seed)
        optimizer.step()


def accumulated(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for seed in range(4):
        backward(model, seed)
        if seed % 2:
            optimizer.step()
            model.zero_grad()


def assigned(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for seed in range(3):
        optimizer.zero_grad()
        backward(model, seed)
        for p in trained(model).values():
            p.grad = 0.5 * p.grad
        optimizer.step()


def clipped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for seed in range(3):
        model.zero_grad()
        backward(model, seed)
        nn.utils.clip_grad_norm_(trained(model).values(), 0.01)
        optimizer.step()


def one_without(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Moments are there when a parameter has no gradient for a step."""
    for seed in range(3):
        model.zero_grad()
        backward(model, seed)
        if seed == 1:
            list(trained(model).values())[2].grad = None
        optimizer.step()


def one_unused(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step that does not come to the second block, nor to the head."""
    for seed in range(3):
        optimizer.zero_grad()
        if seed == 1:
            model(**batch(seed=seed), output_hidden_states=True).hidden_states[1][..., :8].square().sum().backward()
        else:
            backward(model, seed)
        optimizer.step()


def one_frozen(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    one = list(trained(model).values())[2]
    for seed in range(3):
        one.requires_grad_(seed != 1)
        model.zero_grad()
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()


@pytest.mark.parametrize("loop", [dropped, accumulated, assigned, clipped, one_without, one_unused, one_frozen])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_loop_trains_as_with_torchs_optimizer(loop: Loop, kind: str) -> None:
    ours, theirs = tiny(), tiny()
    if kind == "adamw":
        masked: torch.optim.Optimizer = MaskedAdamW(FlatAdapter(ours), lr=LR, weight_decay=DECAY)
        wanted: torch.optim.Optimizer = torch.optim.AdamW(trained(theirs).values(), lr=LR, weight_decay=DECAY)
    else:
        masked = MaskedSGD(FlatAdapter(ours), lr=LR, momentum=0.9, weight_decay=DECAY)
        wanted = torch.optim.SGD(trained(theirs).values(), lr=LR, momentum=0.9, weight_decay=DECAY)
    loop(ours, masked)
    loop(theirs, wanted)
    for p, q in zip(trained(ours).values(), trained(theirs).values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_gradients_that_are_written_by_hand_are_stepped() -> None:
    """Past any backward pass, or where one did not come to a parameter."""
    model = tiny()
    flat = FlatAdapter(model)
    optimizer = MaskedSGD(flat, lr=1.0)
    before = flat.data.detach().clone()
    optimizer.zero_grad()
    flat.grad.fill_(0.5)
    optimizer.step()
    torch.testing.assert_close(flat.data.detach(), before - 0.5)
    optimizer.zero_grad()
    model(**batch(), output_hidden_states=True).hidden_states[1].sum().backward()
    flat.grad[flat.values(None)] = 0.25
    head = flat.data.detach()[flat.values(None)].clone()
    optimizer.step()
    torch.testing.assert_close(flat.data.detach()[flat.values(None)], head - 0.25)


@pytest.mark.parametrize("whose", ["model", "optimizer"])
def test_a_step_without_a_backward_pass_moves_nothing(whose: str) -> None:
    """As torch's, whose zero_grad leaves no gradients."""
    model = tiny()
    flat = FlatAdapter(model)
    optimizer = MaskedAdamW(flat, lr=0.1, weight_decay=0.5)
    backward(model, 0)
    optimizer.step()
    before, steps = flat.data.detach().clone(), optimizer.state[flat.data]["step"].clone()
    (model if whose == "model" else optimizer).zero_grad()
    optimizer.step()
    assert torch.equal(flat.data.detach(), before)
    assert torch.equal(optimizer.state[flat.data]["step"], steps)


def test_gradients_are_in_the_buffer_when_a_backward_pass_ends_with_and_without_a_capture() -> None:
    model = tiny()
    flat = FlatAdapter(model)
    backward(model, 0)
    wanted = flat.grad.clone()
    for captures in (False, True):
        model.zero_grad()
        flat.grad.fill_(float("nan"))
        if captures:
            with capture_fisher(model):
                backward(model, 0)
        else:
            backward(model, 0)
        torch.testing.assert_close(flat.grad, wanted)
        assert all(p.grad.untyped_storage().data_ptr() == flat.grad.data_ptr() for p in trained(model).values())


def test_what_is_left_in_the_buffer_of_a_parameter_without_a_gradient_is_dropped() -> None:
    model = tiny()
    optimizer = MaskedAdamW(FlatAdapter(model), max_grad_norm=1.0)
    backward(model, 0)
    model.zero_grad()
    optimizer.flat.grad.fill_(float("inf"))
    optimizer.step()  # nothing has a gradient, so nothing is clipped, nor moved
    assert optimizer.flat.grad.abs().max() == 0
    assert optimizer.state_dict()["state"][0]["step"].max() == 0


def test_of_two_flat_adapters_the_later_one_has_the_gradients() -> None:
    model = tiny()
    first = FlatAdapter(model)
    second = FlatAdapter(model)
    model.zero_grad()
    backward(model, 0)
    assert first.grad.abs().max() == 0
    assert second.grad.abs().max() > 0


def test_a_gradient_with_a_graph_keeps_it() -> None:
    model = tiny(attention="eager")
    flat = FlatAdapter(model)
    model.zero_grad()
    model(**batch()).loss.backward(create_graph=True)
    gradients = [p.grad for p in trained(model).values()]
    assert all(g is not None and g.grad_fn is not None for g in gradients)
    assert flat.collect_gradients() is None
    torch.testing.assert_close(torch.cat([g.flatten() for _, p in flat.named_views() for g in (p.grad,)]), flat.grad)


def scaled(model: nn.Module, optimizer: MaskedAdamW, zero: Callable[[], None]) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for seed in range(4):
        zero()
        loss = model(**batch(seed=seed)).loss * (float("inf") if seed == 1 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return scaler


def test_a_grad_scaler_sees_gradients_that_were_dropped_before() -> None:
    models = tiny(), tiny()
    kept, dropping = (MaskedAdamW(FlatAdapter(model)) for model in models)
    scales = scaled(models[0], kept, kept.zero_grad), scaled(models[1], dropping, models[1].zero_grad)
    assert scales[0].get_scale() == scales[1].get_scale() == 512.0
    assert torch.equal(kept.flat.data, dropping.flat.data)
    assert kept.state_dict()["state"][0]["step"].unique().tolist() == [3]


def test_a_gradient_that_a_grad_scaler_did_not_see_is_refused() -> None:
    model = tiny()
    optimizer, scaler = MaskedAdamW(FlatAdapter(model)), torch.amp.GradScaler("cpu")
    before = optimizer.flat.data.detach().clone()
    scaler.scale(model(**batch()).loss).backward()
    name, p = next(iter(trained(model).items()))
    p.grad = p.grad.clone()
    with pytest.raises(BrokenViewsError, match=f"{name}: its gradient was assigned.*GradScaler"):
        scaler.step(optimizer)
    assert torch.equal(optimizer.flat.data, before)


def test_a_flat_adapter_whose_parameters_are_all_frozen_is_refused() -> None:
    model = tiny()
    optimizer = MaskedAdamW(FlatAdapter(model))
    model.requires_grad_(False)
    with pytest.raises(BrokenViewsError, match=r"lora_A\.default\.weight and all other.* are frozen"):
        optimizer.step()


def other_adapter(model: nn.Module) -> None:
    model.add_adapter("other", LoraConfig(r=4, target_modules=["query", "value"]))
    model.set_adapter("other")


def both_adapters(model: nn.Module) -> None:
    model.add_adapter("other", LoraConfig(r=4, target_modules=["query", "value"]))
    model.base_model.set_adapter(["default", "other"])


def another_part(model: nn.Module) -> None:
    """As methods do that train A and B in turn, and only one of them was gathered."""
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.requires_grad_("lora_A" not in name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_adapter, r"lora_A\.other\.weight is trained"),
        (both_adapters, r"lora_A\.other\.weight is trained"),
        (another_part, r"lora_B\.default\.weight is trained"),
    ],
)
def test_training_what_is_not_in_the_flat_adapter_is_refused(change: Callable[[nn.Module], None], words: str) -> None:
    model = tiny(task_type=None)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_A" in name or (change is not another_part and "lora_B" in name))
    optimizer = MaskedAdamW(FlatAdapter(model))
    optimizer.step()
    change(model)
    for _ in range(2):
        with pytest.raises(BrokenViewsError, match=words):
            optimizer.step()


def test_an_adapter_that_is_added_frozen_is_no_trouble() -> None:
    model = tiny(task_type=None)
    optimizer = MaskedAdamW(FlatAdapter(model))
    model.add_adapter("other", LoraConfig(r=4, target_modules=["query", "value"]))
    backward(model, 0)
    optimizer.step()
    assert optimizer.flat.grad.abs().max() > 0


def step(model: nn.Module, optimizer: MaskedAdamW) -> None:
    optimizer.step()


def copied(model: nn.Module, optimizer: MaskedAdamW) -> None:
    optimizer.flat.copy_(torch.zeros(optimizer.flat.numel))


def loaded(model: nn.Module, optimizer: MaskedAdamW) -> None:
    plan = WirePlan(optimizer.flat)
    plan.load(plan.pack(optimizer.flat, round=1, num_samples=1), optimizer.flat)


@pytest.mark.parametrize("write", [step, copied, loaded])
def test_a_backward_through_a_forward_of_before_the_values_changed_is_refused_as_with_torch(write: Loop) -> None:
    model = tiny()
    optimizer = MaskedAdamW(FlatAdapter(model))
    loss = model(**batch()).loss
    loss.backward(retain_graph=True)
    write(model, optimizer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

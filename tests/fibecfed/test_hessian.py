"""Hessian products, Lipschitz estimate and a device's decision against dense Hessians; nothing is left changed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fibecfed.adapter import FlatAdapter
from fibecfed.hessian import hvp
from fibecfed.lossless import device_decision, lipschitz
from fibecfed_kernels import Entry

from .tiny import batch, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = ["differences", "double_backward"]


class Duck:
    """What lossless needs of a FlatAdapter, in any dtype: parameters called head… last, all views into one buffer."""

    def __init__(self, model: nn.Module) -> None:
        named = sorted(model.named_parameters(), key=lambda item: item[0].startswith("head"))
        self.model, self.entries, offset = model, [], 0
        self.data = nn.Parameter(torch.cat([p.detach().flatten() for _, p in named]))
        self.grad = torch.zeros_like(self.data)
        for name, p in named:
            span = slice(offset, offset + p.numel())
            self.entries.append(Entry(name, tuple(p.shape), offset, None if name.startswith("head") else 0))
            p.data, p.grad = self.data.data[span].view(p.shape), self.grad[span].view(p.shape)
            offset += p.numel()
        self.dim = sum(entry.numel for entry in self.entries if entry.layer is not None)

    def values(self, layer: int | None) -> slice:
        return slice(self.dim, self.data.numel()) if layer is None else slice(0, self.dim)

    def zero_grad(self) -> None:
        self.grad.zero_()


class Vectors(nn.Module):
    def __init__(self, lora: int, head: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.head = nn.Parameter(torch.randn(head, dtype=dtype))
        self.lora = nn.Parameter(torch.randn(lora, dtype=dtype))


def quadratic(
    lora: int = 6, head: int = 2, dtype: torch.dtype = torch.float64
) -> tuple[Duck, Callable[[], Tensor], Tensor]:
    """½ zᵀSz + bᵀz with z = (lora, head): the Hessian over the LoRA values is S's upper left corner."""
    model = Vectors(lora, head, dtype)
    S = torch.randn(lora + head, lora + head, dtype=dtype)
    S, b = S + S.T, torch.randn(lora + head, dtype=dtype)

    def loss() -> Tensor:
        z = torch.cat([model.lora, model.head])
        return z @ S @ z / 2 + b @ z

    return Duck(model), loss, S[:lora, :lora]


def mlp() -> tuple[Duck, Callable[[], Tensor], Tensor]:
    """A small network in float64 with its dense Hessian over everything but the head."""
    model = nn.Sequential()
    model.add_module("first", nn.Linear(3, 4))
    model.add_module("bend", nn.Tanh())
    model.add_module("head", nn.Linear(4, 3))
    model.double()
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randint(0, 3, (7,))

    def value(w: Tensor, b: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model.head(torch.tanh(x @ w.T + b)), y)

    blocks = torch.autograd.functional.hessian(value, (model.first.weight.detach(), model.first.bias.detach()))
    sizes = (12, 4)
    dense = torch.cat(
        [torch.cat([blocks[i][j].reshape(sizes[i], sizes[j]) for j in range(2)], dim=1) for i in range(2)]
    )
    return Duck(model), lambda: nn.functional.cross_entropy(model(x), y), dense


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("problem", [quadratic, mlp])
def test_products_are_those_of_the_dense_hessian(problem: Callable, method: str) -> None:
    flat, loss, dense = problem()
    for scale in (1e-3, 1.0, 1e4):
        v = torch.randn(flat.dim, dtype=torch.float64) * scale
        torch.testing.assert_close(hvp(flat, loss, v, method=method), dense @ v, rtol=1e-6, atol=1e-7 * scale)


def test_products_in_float32() -> None:
    flat, loss, dense = quadratic(dtype=torch.float32)
    flat.data.data.mul_(300.0)  # the default step grows with the values
    v = torch.randn(6)
    found = hvp(flat, loss, v)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, dense @ v, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_product_of_a_linear_loss_and_of_zero_is_zero(method: str) -> None:
    model = Vectors(4, 2)
    flat = Duck(model)
    v = torch.randn(4, dtype=torch.float64)
    assert hvp(flat, lambda: model.lora.sum() + model.head.sum(), v, method=method).abs().max() < 1e-9
    assert hvp(flat, lambda: model.lora.pow(4).sum(), torch.zeros(4), method=method).tolist() == [0.0] * 4


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_changed_bit_by_bit(method: str) -> None:
    flat, loss, _ = quadratic(dtype=torch.float32)
    with torch.no_grad():
        flat.data[0], flat.data[1] = 1e-30, 3e7  # (p + s) − s would lose both
    v = torch.randn(6)
    wanted = hvp(flat, loss, v, method=method)
    flat.grad.copy_(1e6 * torch.randn(8))
    data, grad = flat.data.detach().clone(), flat.grad.clone()
    assert torch.equal(hvp(flat, loss, v, method=method), wanted)  # what was in .grad does not enter
    lipschitz(flat, loss, generator(), method=method)
    device_decision(flat, loss, generator=generator(), steps=3, method=method)
    assert torch.equal(flat.data, data)
    assert torch.equal(flat.grad, grad)
    assert all(p.grad.data_ptr() == flat.grad.data_ptr() + 4 * e.offset for e, p in views(flat))


def views(flat: Duck) -> list[tuple[Entry, nn.Parameter]]:
    return [(entry, flat.model.get_parameter(entry.name)) for entry in flat.entries]


def test_values_come_back_when_the_loss_fails() -> None:
    flat, _, _ = quadratic()
    data = flat.data.detach().clone()

    def failing() -> Tensor:
        assert not torch.equal(flat.data, data), "the step was not taken"
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        hvp(flat, failing, torch.ones(6))
    assert torch.equal(flat.data, data)


def test_products_refuse_what_does_not_fit() -> None:
    flat, loss, _ = quadratic()
    with pytest.raises(ValueError, match=r"v: shape \(8,\), wanted \(6,\)"):
        hvp(flat, loss, torch.ones(8))
    with pytest.raises(ValueError, match="method"):
        hvp(flat, loss, torch.ones(6), method="exact")
    with pytest.raises(ValueError, match="step"):
        hvp(flat, loss, torch.ones(6), step=0.0)


@pytest.mark.parametrize("method", METHODS)
def test_a_quadratic_is_its_own_quadratic_model(method: str) -> None:
    flat, loss, dense = quadratic()
    assert lipschitz(flat, loss, generator(), method=method) < 1e-7 * float(dense.norm())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", [[0.3], [-5.0]])
def test_lipschitz_of_a_cubic_is_known(values: list[float], method: str) -> None:
    """L = c·p³/6 has HΔ − ∇L(P+Δ) + ∇L(P) = −c·Δ²/2, of size c·r/2 per unit of Δ."""
    model = Vectors(1, 1)
    flat = Duck(model)
    with torch.no_grad():
        flat.data[0] = values[0]
    found = lipschitz(flat, lambda: (model.lora**3).sum() * 4 / 6, generator(), radius=0.02, method=method)
    assert found == pytest.approx(4 * 0.02 * max(1.0, abs(values[0])) / 2, rel=1e-4)


def test_lipschitz_looks_along_the_gradient_too() -> None:
    """Only one of 2,000 directions is curved to third order: random directions hardly see it, training goes there."""
    model = Vectors(2000, 1)
    flat = Duck(model)
    with torch.no_grad():
        flat.data.zero_()
    found = lipschitz(flat, lambda: model.lora[0] + model.lora[0] ** 3, generator(), radius=0.1)
    assert found == pytest.approx(6 * 0.1 / 2, rel=1e-3)


def test_lipschitz_is_made_by_its_seed_and_refuses_nothing_to_look_at() -> None:
    flat, loss, _ = mlp()
    a, b = (lipschitz(flat, loss, generator(1), samples=1) for _ in range(2))
    assert a == b > 0
    for wrong in ({"samples": 0}, {"radius": 0.0}, {"radius": math.nan}):
        with pytest.raises(ValueError, match="samples, radius"):
            lipschitz(flat, loss, generator(), **wrong)


@pytest.mark.parametrize("method", METHODS)
def test_decision_of_a_device_is_the_rule_on_its_dense_hessian(method: str) -> None:
    flat, loss, dense = mlp()
    exact = np.linalg.eigvalsh(dense.numpy())
    found = device_decision(flat, loss, generator=generator(), steps=99, method=method, radius=1e-4)
    np.testing.assert_allclose(found.eigenvalues, exact, atol=1e-6)
    gaps = np.flatnonzero(np.diff(exact) > 4 * found.lipschitz)
    assert (found.found, found.m, found.dim) == (True, gaps[0] + 1, 16)
    record = json.loads(json.dumps(found.to_record()))
    assert record["m"] == found.m
    assert record["eigenvalues"] == found.eigenvalues
    assert sum(record["weights"]) == pytest.approx(1.0)


def test_a_loss_with_dropout_is_refused() -> None:
    flat, loss, _ = quadratic()
    with pytest.raises(ValueError, match="wanted one value"):
        device_decision(flat, lambda: loss() * nn.functional.dropout(torch.ones(64)).mean(), generator=generator())


def test_on_a_peft_model_both_products_agree_and_the_mode_comes_back() -> None:
    model = tiny("bert", attention="eager", dropout=0.3, lora_dropout=0.5).train()
    flat, data = FlatAdapter(model), batch()
    dim = flat.values(None).start
    assert 0 < dim < flat.data.numel()  # the head stays out

    def loss() -> Tensor:
        return model(**data).loss

    found = [device_decision(flat, loss, generator=generator(), steps=5, method=method) for method in METHODS]
    assert [d.dim for d in found] == [dim, dim]
    largest = max(map(abs, found[1].eigenvalues))
    np.testing.assert_allclose(found[0].eigenvalues, found[1].eigenvalues, atol=0.02 * largest)
    assert model.training
    flat.check()
    model.eval()
    v = torch.randn(dim)
    near, exact = (hvp(flat, loss, v, method=method) for method in METHODS)
    assert float((near - exact).norm()) < 0.01 * float(exact.norm())

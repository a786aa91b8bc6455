"""What lies on the first axis of the modules' inputs must be the samples, in order and each on its own."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from fibecfed import (
    FisherCaptureError,
    UnsupportedModuleError,
    capture_fisher,
    check_sample_axis,
    clip_sample_gradients,
    dp_step,
    score_samples,
)
from fibecfed.sample_axis import few_of
from fibecfed.watching import first_axis
from tests.fibecfed.tiny import batch, tiny

D, CLASSES = 8, 2


class Net(nn.Module):
    """Takes x (N, T, D) through a linear module in some way."""

    def __init__(self, way: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, CLASSES)
        if way is normed:
            self.norm = nn.BatchNorm1d(D)
        self.way = way

    def forward(self, x: Tensor) -> SimpleNamespace:
        hidden = self.way(self, x)
        return SimpleNamespace(logits=self.head(hidden.tanh().mean(1)))


def plain(net: nn.Module, x: Tensor) -> Tensor:
    return net.b(net.a(x))


def time_first(net: nn.Module, x: Tensor) -> Tensor:
    return net.b(net.a(x.transpose(0, 1))).transpose(0, 1)


def sorts(net: nn.Module, x: Tensor) -> Tensor:
    """By a sample's own value, as models do that pack by length."""
    order = x[:, 0, 0].argsort()
    return net.b(net.a(x[order]))[order.argsort()]


def mixes(net: nn.Module, x: Tensor) -> Tensor:
    hidden = net.a(x)
    return net.b(hidden - hidden.mean(0))


def experts(net: nn.Module, x: Tensor) -> Tensor:
    """Half of the tokens goes to another expert; both see tokens on their first axis."""
    first, second = x.flatten(0, 1).chunk(2)
    return torch.cat([net.a(first), net.b(second)]).view_as(x)


def some(net: nn.Module, x: Tensor) -> Tensor:
    """Every other sample passes by."""
    out = x.clone()
    out[::2] = net.b(net.a(x[::2]))
    return out


def normed(net: nn.Module, x: Tensor) -> Tensor:
    """By the batch's mean in train mode, by what was learnt in eval mode."""
    return net.b(net.norm(net.a(x).transpose(1, 2)).transpose(1, 2))


def model_of(way: Callable[[nn.Module, Tensor], Tensor]) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["a", "b"], init_lora_weights=False, modules_to_save=["head"])
    return get_peft_model(Net(way), config)


def samples(n: int = 4, tokens: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, tokens, D, generator=generator)
    x[:, 0, 0] = torch.arange(n)  # in the order of sorts()
    return {"x": x, "labels": torch.arange(n) % CLASSES}


def loss(model: nn.Module, given: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(given["x"]).logits, given["labels"], reduction="none")


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)


KEPT: dict[str, Any] = {"max_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": 4, "sample_loss": loss}


@pytest.mark.parametrize("way", [time_first, sorts, mixes, experts])
def test_a_model_whose_first_axis_is_not_the_samples_is_refused_where_its_length_fits(
    way: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    """N = T, and as many tokens as samples for each expert: the numbers alone would not tell."""
    given = samples(4, 2) if way is experts else samples()
    model = model_of(way)
    with capture_fisher(model, "sum", num_samples=4):  # what cannot be seen from there
        loss(model, given).sum().backward()
    model.zero_grad()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    with pytest.raises(FisherCaptureError, match=r"first axis"):
        score_samples(model, [given], sample_loss=loss)
    with pytest.raises(FisherCaptureError, match=r"first axis"):
        dp_step(model, given, optimizer, **KEPT)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    with pytest.raises(FisherCaptureError, match=r"(base_model\.model\.[ab]: .*first axis)"):
        check_sample_axis(model, few_of(given, 4), loss)


def test_a_model_that_keeps_its_samples_apart_passes_untouched() -> None:
    model = model_of(plain).train()
    model.base_model.model.b.eval()
    given = samples(5, 3)
    given["x"][3] = float("nan")  # its own trouble
    given["labels"][1] = -100  # no loss: nothing to see
    assert check_sample_axis(model, given, loss)
    assert check_sample_axis(model, {name: value.flip(0) for name, value in given.items()}, loss)
    assert check_sample_axis(tiny(), batch())
    assert model.training
    assert not model.base_model.model.b.training
    assert all(p.grad is None for p in model.parameters())
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        assert not any(getattr(module, hooks) for module in model.modules())
    assert not any("forward" in module.__dict__ for module in model.modules() if type(module) is nn.Linear)


def test_where_no_loss_has_a_gradient_nothing_was_seen_and_it_is_looked_again() -> None:
    model, given = model_of(time_first), samples(3, 3)
    none = {**given, "labels": torch.full((3,), -100)}
    assert not check_sample_axis(model, none, loss)
    one = {**none, "labels": none["labels"].index_fill(0, torch.tensor(1), 1)}
    for seen in (given, one):
        with pytest.raises(FisherCaptureError, match=r"first axis"):
            check_sample_axis(model, seen, loss)
        with pytest.raises(FisherCaptureError, match=r"first axis"):
            score_samples(model, [none, seen], sample_loss=loss)
    model, given = model_of(mixes), samples(7, 2)  # the three that are looked at first have no label
    one = {**given, "labels": torch.full((7,), -100).index_fill(0, torch.tensor(1), 1)}
    with pytest.raises(FisherCaptureError, match=r"first axis"):
        score_samples(model, [one], sample_loss=loss)
    none = {**given, "labels": torch.full((7,), -100)}
    optimizer = optimizer_of(model)
    dp_step(model, none, optimizer, **KEPT)
    with pytest.raises(FisherCaptureError, match=r"first axis"):
        dp_step(model, one, optimizer, **KEPT)


def test_a_module_that_mixes_samples_in_train_mode_is_refused_there() -> None:
    model = model_of(normed).train()
    with pytest.raises(UnsupportedModuleError, match=r"norm: BatchNorm1d mixes the samples of a batch, wanted"):
        capture_fisher(model).__enter__()
    model.eval()
    with capture_fisher(model, "sum") as fisher:
        loss(model, samples()).sum().backward()
    assert fisher.scores.shape == (4,)


def test_it_is_looked_at_in_eval_mode_and_modules_that_see_too_few_are_named() -> None:
    model = model_of(normed).train()
    check_sample_axis(model, samples(), loss)
    assert int(model.base_model.model.norm.num_batches_tracked) == 0
    with pytest.raises(FisherCaptureError, match=r"[ab]: saw 2 samples where there are 4 losses"):
        check_sample_axis(model_of(some), samples(), loss)


def test_the_samples_looked_at_are_three_the_other_way_round_or_all() -> None:
    given = samples(7, 2)
    assert torch.equal(few_of(given, 7)["x"], given["x"][[6, 3, 0]])
    assert torch.equal(few_of(given, 7)["labels"], given["labels"][[6, 3, 0]])
    for other in (samples(3), {**given, "places": torch.arange(3)}, {**given, "scale": torch.tensor(1.0)}):
        assert few_of(other, len(other["x"])) is other
    named: dict[str, object] = {**given, "names": ["x"] * 7}
    assert few_of(named, 7) is named  # type: ignore[arg-type]


def test_the_axis_is_looked_at_once_a_data_set_and_once_a_model_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []

    def look(model: nn.Module, given: Mapping[str, Tensor], sample_loss: object) -> bool:
        looked.append(len(given["x"]))
        return True

    monkeypatch.setattr("fibecfed.scoring.check_sample_axis", look)
    monkeypatch.setattr("fibecfed.privacy.check_sample_axis", look)
    model = model_of(plain)
    optimizer = optimizer_of(model)
    score_samples(model, [samples(1), samples(5), samples(6)], sample_loss=loss)
    assert looked == [3]
    for n in (1, 2, 9):
        dp_step(model, samples(n), optimizer, **KEPT)
    assert looked == [3, 2]
    dp_step(model, samples(4), optimizer, **{**KEPT, "sample_loss": lambda m, given: loss(m, given)})
    assert looked == [3, 2, 3], "another loss may mix the samples"
    dp_step(model, samples(4), optimizer, **KEPT)
    model.get_parameter("base_model.model.b.lora_A.default.weight").requires_grad_(False)
    for _ in range(2):
        dp_step(model, samples(4), optimizer_of(model), **KEPT)
    assert looked == [3, 2, 3, 3, 3], "as may what is trained now"
    gone = weakref.ref(held := model_of(plain))
    dp_step(held, samples(4), optimizer_of(held), **{**KEPT, "sample_loss": partial(lambda _, m, g: loss(m, g), held)})
    del held
    gc.collect()
    assert gone() is None, "a loss that holds on to its model"


def test_modules_that_see_some_of_the_samples_are_refused_by_the_models_own_input() -> None:
    """With a mean over four the scores of two would also be a quarter of what they are."""

    model, given = model_of(some), samples()
    words = r"[ab]: saw 2 samples, wanted 4 \(the first axis of the model's input; num_samples says another number\)"
    with pytest.raises(FisherCaptureError, match=words), capture_fisher(model):
        loss(model, given).mean().backward()
    words = r"b: saw 2 samples where .*head.* saw 4; one of them has not the samples on its input's first axis"
    with pytest.raises(FisherCaptureError, match=words), clip_sample_gradients(model, 1.0):
        loss(model, given).mean().backward()
    with capture_fisher(model, num_samples=2) as fisher:
        loss(model, given).mean().backward()
    assert len(fisher.scores) == 2


@pytest.mark.parametrize("call", ["keywords", "embeddings", "a dict", "positional"])
def test_the_number_of_samples_is_read_from_what_the_model_is_called_with(call: str) -> None:
    model, given = tiny(), batch(4)
    labels = given.pop("labels")

    class Flattens(nn.Module):
        """Takes (N, 2, …) apart into 2 N samples, as models of several choices do."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, *args: object, **kwargs: Tensor) -> Tensor:
            given = args[0] if args and isinstance(args[0], Mapping) else kwargs
            if args and isinstance(args[0], Tensor):
                given = {"input_ids": args[0]}
            flat = {name: value.flatten(0, 1) for name, value in given.items()}
            return self.inner(**flat).logits

    whole = Flattens()
    pairs = {name: value.unflatten(0, (2, 2)) for name, value in given.items()}
    if call == "embeddings":
        embed = model.get_input_embeddings()
        pairs["inputs_embeds"] = embed(pairs.pop("input_ids"))
    args = {"a dict": [pairs], "positional": [pairs.get("input_ids")]}.get(call, [])
    kwargs = {} if args else pairs
    with pytest.raises(FisherCaptureError, match=r"saw 4 samples, wanted 2 \(the first axis"), capture_fisher(whole):
        F.cross_entropy(whole(*args, **kwargs), labels).backward()


def test_a_number_has_no_axis_for_samples() -> None:
    assert first_axis([None, torch.tensor(1.0), torch.zeros(3, 2)]) == 3
    assert first_axis([torch.tensor(1.0), "text"]) is None


def test_nothing_is_left_on_the_model_after_a_block() -> None:
    model = tiny()
    for block in (capture_fisher(model), clip_sample_gradients(model, 1.0)):
        with block:
            model(**batch()).loss.backward()
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            assert not any(getattr(module, hooks) for module in model.modules())

"""Layer sensitivity against a plain loop over single samples without padding; the noise against its definition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fibecfed.layers import choose_gal, combine, find_blocks, perturbation, sensitivity

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = {"vocab_size": 40, "num_labels": 3, "pad_token_id": 0}
BERT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24, **SIZE}
FAMILIES: dict[str, tuple[Any, list[str]]] = {
    "bert": (hf.BertConfig(max_position_embeddings=32, **BERT), ["query", "value"]),
    "roberta": (hf.RobertaConfig(max_position_embeddings=32, **BERT), ["query", "value"]),
    "mpnet": (hf.MPNetConfig(max_position_embeddings=32, **{**BERT, "pad_token_id": 1}), ["q", "v"]),
    "distilbert": (hf.DistilBertConfig(dim=16, n_layers=3, n_heads=2, hidden_dim=24, **SIZE), ["q_lin", "v_lin"]),
    "llama": (hf.LlamaConfig(num_key_value_heads=1, **BERT), ["q_proj", "v_proj"]),
    "gpt2": (hf.GPT2Config(n_embd=16, n_layer=3, n_head=2, n_positions=32, **SIZE), ["c_attn"]),
}
SENTENCES = [[7, 3, 12, 9, 30, 21, 2], [5, 8, 11], [4, 35, 19, 6, 28]]
LABELS = [2, 0, 1]


def tiny(family: str, task: str = "SequenceClassification") -> nn.Module:
    """A float64 PEFT model with random B (so that LoRA counts) and much dropout (so that leaving it on is seen)."""
    config, targets = FAMILIES[family]
    torch.manual_seed(3)
    base = getattr(hf, f"AutoModelFor{task}").from_config(config)
    kind = "SEQ_CLS" if task == "SequenceClassification" else "TOKEN_CLS"
    lora = LoraConfig(task_type=kind, r=4, target_modules=targets, lora_dropout=0.5, init_lora_weights=False)
    return get_peft_model(base, lora).double()


def padded(pad: int, side: str, width: int) -> dict[str, Tensor]:
    rows, mask = [], []
    for ids in SENTENCES:
        fill = width - len(ids)
        rows.append(ids + [pad] * fill if side == "right" else [pad] * fill + ids)
        mask.append([1] * len(ids) + [0] * fill if side == "right" else [0] * fill + [1] * len(ids))
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask), "labels": torch.tensor(LABELS)}


def one_by_one(model: nn.Module, blocks: Sequence[nn.Module], norm: float, gamma: float) -> Tensor:
    """I_l by its definition: one sample at a time, no padding, embeddings handed in, p-norms written out."""
    model.eval()
    embed = model.get_input_embeddings()
    outputs: list[Tensor] = []
    handles = [
        b.register_forward_hook(lambda m, a, o: outputs.append(o if torch.is_tensor(o) else o[0])) for b in blocks
    ]

    def run(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        outputs.clear()
        return model(inputs_embeds=x, attention_mask=torch.ones(x.shape[:2])).logits, list(outputs)

    total = torch.zeros(len(blocks), dtype=torch.float64)
    for ids, label in zip(SENTENCES, LABELS, strict=True):
        x = embed(torch.tensor([ids])).detach().requires_grad_()
        logits, clean = run(x)
        (g,) = torch.autograd.grad(-logits.log_softmax(-1)[..., label].sum(), x)
        if math.isinf(norm):
            noise = gamma * g.sign()
        else:
            q = norm / (norm - 1)
            noise = gamma * g.sign() * g.abs() ** (q - 1) / (g.abs() ** q).sum() ** ((q - 1) / q)
        _, noisy = run(x.detach() + noise)
        total += torch.stack([(b - a).norm() / a.norm() for a, b in zip(clean, noisy, strict=True)]).detach()
    for handle in handles:
        handle.remove()
    return total / len(SENTENCES)


@pytest.mark.parametrize("norm", [2, 3.0, math.inf])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_sensitivity_is_that_of_single_samples_without_padding(family: str, side: str, norm: float) -> None:
    batch = padded(0, side, 9)
    if side == "right" or family == "llama":
        model = tiny(family).train()
    else:  # the pooled token of an encoder would be padding: give every token its sample's label
        model = tiny(family, "TokenClassification").train()
        batch["labels"] = torch.where(batch["attention_mask"] == 1, batch["labels"][:, None], -100)
    if family == "bert" and side == "left":  # BERT counts positions from the left edge unless told
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    inner = model.base_model.model
    blocks = list(inner.model.layers if family == "llama" else getattr(inner, family).encoder.layer)
    found = sensitivity(model, batch, norm=norm, gamma=0.05)
    torch.testing.assert_close(found, one_by_one(model, blocks, norm, 0.05), rtol=1e-5, atol=0.0)
    assert found.dtype == torch.float64


@pytest.mark.parametrize("family", ["mpnet", "distilbert", "gpt2"])
def test_sensitivity_of_other_families(family: str) -> None:
    model = tiny(family)
    batch = padded(model.config.pad_token_id, "right", 8)
    wanted = one_by_one(model, find_blocks(model), 2.0, 0.01)
    torch.testing.assert_close(sensitivity(model, batch), wanted, rtol=1e-5, atol=0.0)


def test_float32_is_close_to_float64() -> None:
    model, batch = tiny("bert"), padded(0, "right", 9)
    wanted = sensitivity(model, batch)
    torch.testing.assert_close(sensitivity(model.float(), batch), wanted, rtol=1e-3, atol=1e-6)


def test_the_call_leaves_the_model_as_it_was() -> None:
    model = tiny("llama").train()
    model.base_model.model.model.layers[1].eval()  # mixed on purpose
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0) if p.requires_grad else None
    flags = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    noise = torch.get_rng_state()
    a, b = (sensitivity(model, padded(0, "right", 9)) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), noise)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all((p.grad == 7.0).all() if p.requires_grad else p.grad is None for p in model.parameters())
    assert model.config.use_cache is True
    assert not any(m._forward_hooks for m in model.modules())


def test_hooks_and_flags_come_back_when_the_forward_fails() -> None:
    model = tiny("bert").train()
    batch = padded(0, "right", 9)
    batch["labels"] = torch.tensor([2, 0, 9])
    with pytest.raises(IndexError):
        sensitivity(model, batch)
    assert not any(m._forward_hooks for m in model.modules())
    assert model.training


def test_parameters_need_no_gradient() -> None:
    model, batch = tiny("bert"), padded(0, "right", 9)
    wanted = sensitivity(model, batch)
    with torch.no_grad():
        torch.testing.assert_close(sensitivity(model.requires_grad_(False), batch), wanted)


def test_a_sample_without_gradient_contributes_nothing() -> None:
    model, batch = tiny("bert"), padded(0, "right", 9)
    pair = sensitivity(model, {k: v[:2] for k, v in batch.items()})
    batch["labels"][2] = -100  # cross-entropy leaves it out
    torch.testing.assert_close(sensitivity(model, batch), pair * 2 / 3, rtol=1e-6, atol=0.0)


def test_layers_asked_for_come_in_the_order_asked() -> None:
    model, batch = tiny("bert"), padded(0, "right", 9)
    torch.testing.assert_close(sensitivity(model, batch, layers=[2, 0]), sensitivity(model, batch)[[2, 0]])
    for wrong in ([], [3], [-1], [1, 1]):
        with pytest.raises(ValueError, match="layers"):
            sensitivity(model, batch, layers=wrong)


def test_batches_that_do_not_fit_are_refused() -> None:
    model, batch = tiny("bert"), padded(0, "right", 9)
    for name in ("input_ids", "labels"):
        with pytest.raises(ValueError, match=f"batch: '{name}'"):
            sensitivity(model, {k: v for k, v in batch.items() if k != name})
    with pytest.raises(ValueError, match="attention_mask"):
        sensitivity(model, {**batch, "attention_mask": torch.ones(3, 4)})


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_blocks_are_found_in_order(family: str) -> None:
    model = tiny(family)
    blocks = find_blocks(model)
    names = [name for name, module in model.named_modules() if any(module is block for block in blocks)]
    assert [int(name.rpartition(".")[2]) for name in names] == [0, 1, 2]
    assert len(find_blocks(model.get_base_model())) == 3


class Toy(nn.Module):
    """Blocks of experts; ``turns`` runs of every block in one forward."""

    def __init__(self, turns: int = 1) -> None:
        super().__init__()
        self.embed, self.head, self.turns = nn.Embedding(40, 6), nn.Linear(6, 3), turns
        self.blocks = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(6, 6)])}) for _ in range(2))
        for block in self.blocks:
            block.forward = lambda x, expert=block["experts"][0]: expert(x)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        x = self.embed(input_ids)
        for block in [*self.blocks] * self.turns:
            x = block(x)
        logits = self.head(x.mean(1))
        return hf.modeling_outputs.SequenceClassifierOutput(
            loss=None if labels is None else nn.functional.cross_entropy(logits, labels), logits=logits
        )


def test_lists_inside_blocks_are_not_blocks_and_shared_blocks_are_refused() -> None:
    toy = Toy()
    assert find_blocks(toy) == list(toy.blocks)
    with pytest.raises(ValueError, match="ran 2 times"):
        sensitivity(Toy(turns=2), padded(0, "right", 9))


def test_padding_takes_no_noise_even_where_the_model_looks_at_it() -> None:
    toy, batch = Toy().double(), padded(0, "right", 9)
    x = toy.embed(batch["input_ids"]).detach().requires_grad_()
    logits = toy.head(toy.blocks[1](toy.blocks[0](x)).mean(1))
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(logits, batch["labels"]), x)
    real = batch["attention_mask"][..., None]
    assert (g * (1 - real)).abs().sum() > 0
    noise = 0.01 * g * real / (g * real).flatten(1).norm(dim=1)[:, None, None]
    clean, noisy = toy.blocks[0](x) * real, toy.blocks[0](x + noise) * real
    wanted = ((noisy - clean).flatten(1).norm(dim=1) / clean.flatten(1).norm(dim=1)).mean(0, keepdim=True)
    torch.testing.assert_close(sensitivity(toy, batch, layers=[0]), wanted.detach())


def test_two_stacks_or_none_are_refused() -> None:
    t5 = hf.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    with pytest.raises(ValueError, match=r"decoder\.block.*encoder\.block"):
        find_blocks(hf.T5ForConditionalGeneration(t5))
    with pytest.raises(ValueError, match="wanted exactly one list"):
        find_blocks(nn.Linear(2, 2))


def size_of(noise: Tensor, norm: float) -> Tensor:
    return torch.linalg.vector_norm(noise.flatten(1), norm, dim=1)


@given(norm=st.sampled_from([1.0, 1.5, 2.0, 3.0, 7.0, math.inf]), scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e20]))
def test_no_feasible_noise_raises_the_loss_more(norm: float, scale: float) -> None:
    draw = torch.Generator().manual_seed(round(norm * 10) if math.isfinite(norm) else 0)
    grad = torch.randn(4, 5, 3, generator=draw, dtype=torch.float64) * scale
    grad[1, 2] = 0.0
    best = perturbation(grad, norm, 0.3)
    torch.testing.assert_close(size_of(best, norm), torch.full((4,), 0.3, dtype=torch.float64))
    gain = (grad * best).flatten(1).sum(1)
    dual = 1.0 if math.isinf(norm) else math.inf if norm == 1.0 else norm / (norm - 1)
    torch.testing.assert_close(gain, 0.3 * size_of(grad, dual))  # Hölder's inequality, met with equality
    for _ in range(50):
        other = torch.randn(4, 5, 3, generator=draw, dtype=torch.float64) + best * torch.randn(1, generator=draw) * 5
        other = other * (0.3 / size_of(other, norm))[:, None, None]
        assert ((grad * other).flatten(1).sum(1) <= gain * (1 + 1e-12)).all()


@pytest.mark.parametrize("norm", [1.0, 1.5, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("scale", [1.0, 1e-36])
def test_noise_of_a_zero_gradient_is_zero_and_scale_does_not_matter(norm: float, scale: float) -> None:
    grad = torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, -4.0]])
    noise = perturbation(grad * scale, norm, 2.0)
    assert noise[0].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(noise, perturbation(grad, norm, 2.0), rtol=1e-5, atol=0.0)
    assert float(size_of(noise, norm)[1]) == pytest.approx(2.0, rel=1e-5)


def test_known_noise() -> None:
    grad = torch.tensor([[3.0, 0.0, -4.0]])
    assert perturbation(grad, 2.0, 10.0)[0].tolist() == pytest.approx([6.0, 0.0, -8.0])
    assert perturbation(grad, math.inf, 10.0)[0].tolist() == [10.0, 0.0, -10.0]
    assert perturbation(grad, 1.0, 10.0)[0].tolist() == [0.0, 0.0, -10.0]


@pytest.mark.parametrize(("norm", "gamma"), [(0.5, 1.0), (math.nan, 1.0), (2.0, 0.0), (2.0, math.inf)])
def test_noise_refuses_balls_that_are_none(norm: float, gamma: float) -> None:
    with pytest.raises(ValueError, match=r"^(norm|gamma):"):
        perturbation(torch.ones(1, 2), norm, gamma)


def test_combine_weighs_devices_by_their_samples() -> None:
    values = [torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 4.0, 2.0], dtype=torch.float64)]
    found = combine(values, [30, 10])
    assert found.tolist() == [0.75, 1.0, 2.0]
    for sizes in ([1], [1, 0], [1, -1], [1, math.nan]):
        with pytest.raises(ValueError, match="sizes"):
            combine(values, sizes)
    with pytest.raises(ValueError, match="sizes"):
        combine([], [])


def test_gal_is_the_most_sensitive_layers_ties_to_the_lower_index() -> None:
    values = torch.tensor([0.3, 0.9, 0.3, 0.1, 0.9])
    wanted = [(1,), (1, 4), (0, 1, 4), (0, 1, 2, 4), (0, 1, 2, 3, 4)]
    assert [choose_gal(values, count) for count in range(1, 6)] == wanted
    assert choose_gal(torch.tensor([0.1, 0.5, 0.2]), 2, layers=[4, 8, 6]) == (6, 8)
    for count in (0, 6):
        with pytest.raises(ValueError, match="count"):
            choose_gal(values, count)
    for wrong, names in ((torch.tensor([0.1, math.nan]), None), (values, [0, 1])):
        with pytest.raises(ValueError, match="sensitivity"):
            choose_gal(wrong, 1, names)

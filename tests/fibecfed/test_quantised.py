"""LoRA on base weights of four and eight bits (bitsandbytes; QLoRA): scored, clipped, stepped and sent as on others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaForSequenceClassification

from fibecfed import (
    FlatAdapter,
    MaskedAdamW,
    UnsupportedModuleError,
    capture_fisher,
    clip_sample_gradients,
    score_samples,
)
from fibecfed.losses import classification_loss
from fibecfed_kernels import WirePlan
from tests.fibecfed.tiny import TARGETS, base, batch, fill_b

# double: quantised constants of the quantisation, as QLoRA has them
FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
KINDS = {"four bits": FOUR, "eight bits": {"load_in_8bit": True}}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    base("llama").save_pretrained(path)
    return path


def quantised(folder: Path, kind: str | None) -> PeftModel:
    options: dict[str, Any] = {}
    if kind is not None:
        options["quantization_config"] = BitsAndBytesConfig(**KINDS[kind])
    model = LlamaForSequenceClassification.from_pretrained(folder, device_map="cpu", dtype=torch.float32, **options)
    for module in model.modules():
        if isinstance(module, Linear4bit):  # on some processors it would round its scales to bfloat16 for inference
            module.support_avx512bf16_for_cpu = False
    torch.manual_seed(0)
    lora = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=[*TARGETS["llama"], "down_proj"])
    peft = get_peft_model(model, lora)
    fill_b(peft)
    return peft.eval()


def lora(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "lora_" in name]


def gradients(model: nn.Module, of: list[nn.Parameter]) -> list[list[Tensor]]:
    """Each sample's own, one by one."""
    whole, found = batch(), []
    for n in range(len(whole["labels"])):
        loss = classification_loss(model, {name: values[n : n + 1] for name, values in whole.items()}).sum()
        found.append([g.double() for g in torch.autograd.grad(loss, of)])
    return found


@kinds
def test_scores_are_those_of_samples_alone(folder: Path, kind: str) -> None:
    model = quantised(folder, kind)
    of_base = {type(module) for module in model.modules() if type(module).__module__ == "bitsandbytes.nn.modules"}
    assert of_base == {Linear4bit if kind == "four bits" else Linear8bitLt}
    wanted = torch.stack([torch.stack([g.square().sum() for g in own]).sum() for own in gradients(model, lora(model))])
    with capture_fisher(model) as fisher:
        model(**batch()).loss.backward()
    torch.testing.assert_close(fisher.scores.double(), wanted, rtol=1e-4, atol=0)
    torch.testing.assert_close(score_samples(model, [batch()]).scores.double(), wanted, rtol=1e-4, atol=0)


def test_scores_at_four_bits_are_those_of_the_same_weights_in_float64(folder: Path) -> None:
    model = quantised(folder, "four bits")
    scores = score_samples(model, [batch()]).scores
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear4bit):
                plain = nn.Linear(child.in_features, child.out_features, bias=False)
                plain.weight = nn.Parameter(dequantize_4bit(child.weight.data, child.weight.quant_state))
                module._modules[name] = plain.requires_grad_(False)
    model.double()
    wanted = torch.stack([torch.stack([g.square().sum() for g in own]).sum() for own in gradients(model, lora(model))])
    torch.testing.assert_close(scores.double(), wanted, rtol=1e-4, atol=0)


@kinds
def test_the_clipped_sum_is_that_of_samples_alone(folder: Path, kind: str) -> None:
    model = quantised(folder, kind)
    trained = [p for p in model.parameters() if p.requires_grad]
    alone = gradients(model, trained)
    norms = [torch.stack([g.square().sum() for g in own]).sum().sqrt() for own in alone]
    bound = float(torch.stack(norms).median())
    wanted = [
        sum(min(1.0, bound / float(norm)) * own[i] for norm, own in zip(norms, alone, strict=True))
        for i in range(len(trained))
    ]
    with clip_sample_gradients(model, bound):
        model(**batch()).loss.backward()
    for p, total in zip(trained, wanted, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad.double(), total, rtol=1e-3, atol=1e-3 * float(torch.as_tensor(total).norm()))


@kinds
def test_steps_move_the_adapter_alone_and_it_travels_to_the_same_base(folder: Path, kind: str) -> None:
    ours, theirs = quantised(folder, kind), quantised(folder, kind)
    frozen = {name: p.detach().clone() for name, p in ours.named_parameters() if not p.requires_grad}
    flat = FlatAdapter(ours)
    optimizer, wanted = MaskedAdamW(flat), torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad])
    for model, stepped in ((ours, optimizer), (theirs, wanted)):
        stepped.zero_grad()
        model(**batch()).loss.backward()
        stepped.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(p, frozen[name]) for name, p in ours.named_parameters() if name in frozen)

    other = FlatAdapter(quantised(folder, kind))
    plan = WirePlan(other)
    plan.load(plan.pack(flat, round=1, num_samples=5), other)
    assert torch.equal(flat.data, other.data)
    with pytest.raises(ValueError, match="identity"):  # gradients of other weights are other gradients
        plan.pack(FlatAdapter(quantised(folder, None)), round=1, num_samples=5)


def test_a_kind_of_base_that_was_never_tried_is_refused_by_name(folder: Path) -> None:
    model = quantised(folder, "eight bits")
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    layer.__class__ = type("OtherBits", (type(layer),), {"__module__": "peft.tuners.lora.other"})
    with pytest.raises(UnsupportedModuleError, match=r"peft\.tuners\.lora\.other\.OtherBits is not supported"):
        score_samples(model, [batch()])

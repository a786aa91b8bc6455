"""Tiny PEFT models of the two kinds, built from configs, with a trained-looking B and head bias (zero B hides half of
every gradient)."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

VOCAB, HIDDEN, LAYERS, CLASSES = 50, 32, 3, 3
KINDS = ("bert", "llama")
TARGETS = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}


def base(kind: str, dropout: float = 0.0, attention: str = "sdpa") -> torch.nn.Module:
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "num_labels": CLASSES,
        "pad_token_id": 0,
        "attn_implementation": attention,
    }
    torch.manual_seed(1)
    if kind == "bert":
        config = BertConfig(**shape, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        return BertForSequenceClassification(config)
    return LlamaForSequenceClassification(LlamaConfig(**shape, num_key_value_heads=2))


def tiny(kind: str = "bert", *, dropout: float = 0.0, attention: str = "sdpa", **lora: Any) -> PeftModel:
    """A LoRA sequence classifier with 3 blocks of width 32; ``lora`` goes to LoraConfig."""
    options = {"task_type": "SEQ_CLS", "r": 4, "lora_alpha": 8, "target_modules": TARGETS[kind], **lora}
    model = get_peft_model(base(kind, dropout, attention), LoraConfig(**options))
    fill_b(model)
    return model.eval()


def fill_b(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or (parameter.requires_grad and name.endswith("bias")):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def batch(samples: int = 5, tokens: int = 9, side: str = "right", seed: int = 3) -> dict[str, Tensor]:
    """A padded batch with lengths from 3 to ``tokens``."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (samples, tokens), generator=generator)
    lengths = torch.randint(3, tokens + 1, (samples,), generator=generator)
    lengths[0] = tokens
    place = torch.arange(tokens)
    mask = place < lengths[:, None] if side == "right" else place >= tokens - lengths[:, None]
    labels = torch.randint(0, CLASSES, (samples,), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels}


def sample(whole: dict[str, Tensor], n: int, padded: bool = False) -> dict[str, Tensor]:
    """Sample n alone, without its padding unless ``padded``."""
    real = whole["attention_mask"][n].bool() | padded
    return {
        "input_ids": whole["input_ids"][n : n + 1, real],
        "attention_mask": whole["attention_mask"][n : n + 1, real],
        "labels": whole["labels"][n : n + 1],
    }

"""Word tokenizers and saved tiny checkpoints of the kinds that models and batches are tested on."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import PreTrainedTokenizerFast

from fibecfed.models import LoadedModel

from .tiny import VOCAB, base

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "</s>"]
WORDS = [f"w{index}" for index in range(VOCAB - len(SPECIAL))]
FIRST_WORD = len(SPECIAL)  # the id of w0


def tokenizer(kind: str, *, pad: bool = True, side: str = "right", limit: int = 64) -> PreTrainedTokenizerFast:
    """bert: [CLS] a [SEP] b [SEP] with token types and a mask token; decoders: the words alone."""
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(SPECIAL + WORDS)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    special = {"eos_token": "</s>", **({"pad_token": "[PAD]"} if pad else {})}
    inputs = ["input_ids", "attention_mask"]
    if kind == "bert":
        words.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
        special |= {"mask_token": "[MASK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        inputs.insert(1, "token_type_ids")
    return PreTrainedTokenizerFast(
        tokenizer_object=words, padding_side=side, model_max_length=limit, model_input_names=inputs, **special
    )


def checkpoint(folder: Path, kind: str, **options: bool) -> Path:
    """A folder with a tiny pretrained body (no head) and its tokenizer."""
    model = base(kind)
    getattr(model, model.base_model_prefix).save_pretrained(folder)
    tokenizer(kind, **options).save_pretrained(folder)
    return folder


def trainable(loaded: LoadedModel) -> dict[str, nn.Parameter]:
    return {name: p for name, p in loaded.model.named_parameters() if p.requires_grad}


def heads(loaded: LoadedModel) -> set[str]:
    names = {name for name in trainable(loaded) if "lora_" not in name}
    assert all(".modules_to_save.default." in name for name in names)
    return {name.removeprefix("base_model.model.").replace("modules_to_save.default.", "") for name in names}


def saved(folder: Path, model: nn.Module, kind: str = "bert") -> Path:
    model.save_pretrained(folder)
    tokenizer(kind).save_pretrained(folder)
    return folder

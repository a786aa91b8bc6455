"""Models: which modules train, from which bits they start, and what is refused."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaModel,
)

from fibecfed.batches import collate, encode
from fibecfed.data import Split
from fibecfed.models import LoadedModel, load_model

from .checkpoints import SPECIAL, checkpoint, heads, saved, tokenizer, trainable
from .tiny import HIDDEN, LAYERS, VOCAB, base

SAMPLES = Split(["w1 w2 w3", "w4", "w5 w6"], None, np.array([0, 1, 1]), None)


def outputs(loaded: LoadedModel) -> Tensor:
    return loaded.model.eval()(**collate(encode(SAMPLES, loaded.tokenizer, 8), range(3))).logits


SHAPE = {"vocab_size": VOCAB, "pad_token_id": 0}


def roberta() -> RobertaModel:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return RobertaModel(RobertaConfig(**SHAPE, **size, max_position_embeddings=66), add_pooling_layer=False)


def distilbert() -> DistilBertModel:
    return DistilBertModel(DistilBertConfig(**SHAPE, dim=32, n_layers=2, n_heads=4, hidden_dim=48))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(**SHAPE, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=4))


@pytest.mark.parametrize(
    ("kind", "targets", "head", "sort"),
    [
        ("bert", ("query", "value"), {"classifier.weight", "classifier.bias"}, "encoder"),
        ("llama", ("q_proj", "v_proj"), {"score.weight"}, "decoder"),
    ],
)
def test_lora_on_query_and_value_and_a_head_that_trains(
    tmp_path: Path, kind: str, targets: tuple[str, ...], head: set[str], sort: str
) -> None:
    loaded = load_model(checkpoint(tmp_path / "tiny", kind), num_classes=5, rank=4)
    assert isinstance(loaded.model, PeftModel)
    assert (loaded.name, loaded.targets, loaded.kind) == ("tiny", targets, sort)
    assert heads(loaded) == head
    lora = [name for name in trainable(loaded) if "lora_" in name]
    assert len(lora) == LAYERS * 2 * 2
    assert all(any(f".{target}.lora_" in name for target in targets) for name in lora)
    assert {tuple(p.shape) for name, p in trainable(loaded).items() if "lora_A" in name} == {(4, HIDDEN)}
    assert outputs(loaded).shape == (3, 5)
    before = {name: p.detach().clone() for name, p in loaded.model.named_parameters()}
    loaded.model(**collate(encode(SAMPLES, loaded.tokenizer, 8), range(3))).loss.backward()
    optimizer = torch.optim.SGD(loaded.model.parameters(), lr=1.0)
    optimizer.step()
    moved = {name for name, p in loaded.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in trainable(loaded) if "lora_A" not in name}  # B = 0: no gradient reaches A yet


@pytest.mark.parametrize(
    ("model", "kind", "targets", "head"),
    [
        (roberta, "bert", ("query", "value"), {"classifier.dense", "classifier.out_proj"}),
        (distilbert, "bert", ("q_lin", "v_lin"), {"pre_classifier", "classifier"}),
        (gpt2, "gpt2", ("c_attn",), {"score"}),
        (lambda: BertForMaskedLM(base("bert").config), "bert", ("query", "value"), {"classifier", "bert.pooler.dense"}),
    ],
)
def test_every_module_that_starts_at_random_trains(
    tmp_path: Path, model: type, kind: str, targets: tuple[str, ...], head: set[str]
) -> None:
    """A frozen random layer between body and classifier would spoil everything silently."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_model(saved(tmp_path, model(), kind), num_classes=3)
    assert loaded.targets == targets
    assert {name.rpartition(".")[0] for name in heads(loaded)} == head
    assert outputs(loaded).isfinite().all()


def test_the_body_is_the_checkpoints_and_frozen(tmp_path: Path) -> None:
    source = saved(tmp_path, base("bert").bert)
    with torch.no_grad():
        torch.manual_seed(5)
        reference = AutoModelForSequenceClassification.from_pretrained(source)
    loaded = load_model(source, num_classes=2)
    body = {name.replace("base_layer.", ""): p for name, p in loaded.model.base_model.model.bert.named_parameters()}
    for name, parameter in reference.bert.named_parameters():
        assert torch.equal(parameter, body[name])
        assert not body[name].requires_grad


def test_same_seed_same_bits_and_the_global_state_stands_still(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, "bert")
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = trainable(load_model(source, num_classes=3, seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    again, other = (trainable(load_model(source, num_classes=3, seed=seed)) for seed in (1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    for part in ("lora_A", "classifier.modules_to_save.default.weight"):
        assert all(not torch.equal(first[name], other[name]) for name in first if part in name)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_bfloat16_is_for_the_frozen_base_alone(tmp_path: Path, kind: str) -> None:
    source = checkpoint(tmp_path, kind)
    loaded, exact = load_model(source, num_classes=3, dtype="bfloat16"), load_model(source, num_classes=3)
    for parameter in loaded.model.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
    assert outputs(loaded).dtype == torch.float32
    torch.testing.assert_close(outputs(loaded), outputs(exact), atol=0.02, rtol=0.02)
    loaded.model(**collate(encode(SAMPLES, loaded.tokenizer, 8), range(3))).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable(loaded).values())


@pytest.mark.parametrize(("rslora", "scale"), [(False, 3.0), (True, 6.0)])
def test_lora_options_reach_the_modules(tmp_path: Path, rslora: bool, scale: float) -> None:
    loaded = load_model(
        checkpoint(tmp_path, "bert"),
        num_classes=2,
        rank=4,
        alpha=12.0,
        dropout=0.25,
        rslora=rslora,
        targets=["key", "dense"],
        attn="eager",
    )
    query = loaded.model.base_model.model.bert.encoder.layer[0].attention
    assert query.self.key.scaling["default"] == pytest.approx(scale)
    assert query.self.key.lora_dropout["default"].p == 0.25
    assert query.output.dense.r["default"] == 4
    assert not hasattr(query.self.query, "lora_A")
    assert loaded.targets == ("key", "dense")
    assert loaded.model.config._attn_implementation == "eager"


def test_targets_do_not_reach_into_the_head(tmp_path: Path) -> None:
    loaded = load_model(saved(tmp_path, roberta()), num_classes=2, targets=["dense"])
    assert not any("lora_" in name for name in trainable(loaded) if "classifier" in name)
    assert heads(loaded) == {
        "classifier.dense.weight",
        "classifier.dense.bias",
        "classifier.out_proj.weight",
        "classifier.out_proj.bias",
    }


def test_the_adapter_saves_and_loads_with_peft_alone(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "base", "bert")
    loaded = load_model(source, num_classes=3)
    with torch.no_grad():
        for parameter in trainable(loaded).values():
            parameter.normal_()
    loaded.model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForSequenceClassification.from_pretrained(source, num_labels=3)
    restored = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    batch = collate(encode(SAMPLES, loaded.tokenizer, 8), range(3))
    torch.testing.assert_close(restored(**batch).logits, outputs(loaded))


def test_a_trained_head_is_kept_and_one_of_another_size_replaced(tmp_path: Path) -> None:
    model = base("bert")
    source = saved(tmp_path, model)
    kept = load_model(source, num_classes=3).model.base_model.model.classifier
    assert torch.equal(kept.modules_to_save["default"].weight, model.classifier.weight)
    assert load_model(source, num_classes=4).model.base_model.model.classifier.weight.shape == (4, HIDDEN)


def test_padding_is_ready_for_batches(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "a", "llama", pad=False, side="left", limit=10**9)
    loaded = load_model(source, num_classes=2)
    assert loaded.tokenizer.pad_token == "</s>"
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id == SPECIAL.index("</s>")
    assert loaded.tokenizer.padding_side == "right"
    assert loaded.tokenizer.model_max_length == 64
    assert loaded.model.config.use_cache is False
    together = outputs(loaded)
    encoded = encode(SAMPLES, loaded.tokenizer, 8)
    alone = torch.cat([loaded.model(**collate(encoded, [index])).logits for index in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-4)


def test_position_tables_bound_the_number_of_tokens(tmp_path: Path) -> None:
    source = tmp_path / "roberta"
    saved(source, roberta())
    tokenizer("bert", limit=10**9).save_pretrained(source)
    loaded = load_model(source, num_classes=2)
    assert loaded.tokenizer.model_max_length == 65  # its first position is the one after padding's
    text = Split([" ".join(["w1"] * 80)], None, np.array([0]), None)
    assert loaded.model(**collate(encode(text, loaded.tokenizer, 65), [0])).logits.isfinite().all()


def test_loading_is_silent_but_for_warnings(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_progress_bar()
    transformers_logging.enable_propagation()
    load_model(checkpoint(tmp_path, "bert"), num_classes=2)
    logging.getLogger("transformers.modeling_utils").warning("LOAD REPORT of somebody else's model")
    transformers_logging.disable_propagation()
    assert {record.getMessage() for record in caplog.records} == {"LOAD REPORT of somebody else's model"}
    assert "Loading weights" not in capfd.readouterr().err
    assert transformers_logging.is_progress_bar_enabled()
    assert not [warning for warning in recwarn if warning.category is FutureWarning]

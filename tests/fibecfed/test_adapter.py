"""FlatAdapter: one buffer under everything trainable, in a stable order, and loud when the views break."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fibecfed import BrokenViewsError, FlatAdapter
from fibecfed.adapter import layer_of
from tests.fibecfed.tiny import KINDS, LAYERS, base, batch, tiny


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_views_of_one_buffer(kind: str) -> None:
    model = tiny(kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    output = model(**batch()).logits
    flat = FlatAdapter(model)
    assert torch.equal(model(**batch()).logits, output)
    assert {e.name for e in flat.entries} == before.keys()
    for entry in flat.entries:
        values = flat.data.detach()[entry.offset : entry.offset + entry.numel].view(entry.shape)
        assert torch.equal(values, before[entry.name])
    model(**batch()).loss.backward()
    for entry, parameter in flat.named_views():
        assert torch.equal(flat.grad[entry.offset : entry.offset + entry.numel].view(entry.shape), parameter.grad)
    assert flat.data.grad is flat.grad
    assert flat.grad.abs().max() > 0
    with torch.no_grad():
        flat.data.zero_()
    assert all(p.abs().max() == 0 for _, p in flat.named_views())


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_slices_in_order_and_the_head_is_last(kind: str) -> None:
    flat = FlatAdapter(tiny(kind))
    assert flat.layers == tuple(range(LAYERS))
    spans = [flat.values(layer) for layer in (*flat.layers, None)]
    assert [s.start for s in spans] == [0, *(s.stop for s in spans[:-1])]
    assert spans[-1].stop == flat.numel
    rows = [flat.rows(layer) for layer in (*flat.layers, None)]
    assert rows[-1].stop == flat.num_rows == int(flat.table.length.numel())
    assert all(e.layer is None for e in flat.entries if "score" in e.name or "classifier" in e.name)
    with pytest.raises(ValueError, match="layer: 9"):
        flat.values(9)


def test_the_table_names_every_row() -> None:
    flat = FlatAdapter(tiny())
    table = flat.table
    for i in (0, 5, flat.num_rows - 1):
        entry = flat.entries[int(table.parameter[i])]
        assert int(table.offset[i]) == entry.offset + int(table.row[i]) * entry.row_length
        assert int(table.length[i]) == entry.row_length
        assert int(table.layer[i]) == (-1 if entry.layer is None else entry.layer)
    assert int(table.length.sum()) == flat.numel


def test_order_and_identity_are_stable_and_tell_models_apart() -> None:
    one, two = FlatAdapter(tiny()), FlatAdapter(tiny())
    assert one.entries == two.entries
    assert dict(one.identity) == dict(two.identity)
    assert dict(one.identity) != dict(FlatAdapter(tiny(r=5)).identity)
    assert one.identity["base_model"] != FlatAdapter(tiny("llama")).identity["base_model"]


def test_zero_grad_keeps_the_views() -> None:
    model = tiny()
    flat = FlatAdapter(model)
    model(**batch()).loss.backward()
    flat.zero_grad()
    assert flat.grad.abs().max() == 0
    model.zero_grad()  # sets .grad to None
    flat.zero_grad()  # takes them back
    model(**batch()).loss.backward()
    flat.check()
    assert flat.grad.abs().max() > 0


def replace(model: nn.Module) -> None:
    query = model.base_model.model.bert.encoder.layer[1].attention.self.query
    query.lora_A["default"].weight = nn.Parameter(torch.zeros(4, 32))


def drop_gradients(model: nn.Module) -> None:
    model.zero_grad()
    model(**batch()).loss.backward()


@pytest.mark.parametrize(
    ("breaks", "match"),
    [
        (lambda m: m.double(), "left the flat buffer"),
        (lambda m: m.to(torch.bfloat16), "left the flat buffer"),
        (replace, r"layer\.1\.attention\.self\.query.*replaced"),
        (drop_gradients, "gradient left the flat buffer"),
    ],
    ids=["double", "bf16", "replaced", "zero_grad"],
)
def test_broken_views_are_refused_by_name(breaks: Callable[[nn.Module], object], match: str) -> None:
    model = tiny()
    flat = FlatAdapter(model)
    breaks(model)
    with pytest.raises(BrokenViewsError, match=match):
        flat.check()


def test_a_bf16_model_trains_a_float32_buffer() -> None:
    model = get_peft_model(base("llama").bfloat16(), LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"]))
    flat = FlatAdapter(model)
    assert flat.data.dtype == torch.float32
    model(**batch()).loss.backward()
    assert flat.grad[flat.values(None)].abs().max() > 0


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model: NoneType, wanted a torch\.nn\.Module"):
        FlatAdapter(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no trainable parameter"):
        FlatAdapter(base("bert").requires_grad_(False))


class TwoStacks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"block": nn.ModuleList([nn.Linear(2, 2)])})
        self.decoder = nn.ModuleDict({"block": nn.ModuleList([nn.Linear(2, 2)])})


def test_two_stacks_of_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="2 stacks"):
        FlatAdapter(TwoStacks())


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("base_model.model.bert.encoder.layer.11.attention.self.query.lora_A.default.weight", 11),
        ("base_model.model.model.layers.3.self_attn.q_proj.lora_B.default.weight", 3),
        ("base_model.model.transformer.h.7.attn.c_attn.lora_A.default.weight", 7),
        ("base_model.model.encoder.block.2.layer.0.SelfAttention.q.lora_A.default.weight", 2),
        ("base_model.model.classifier.modules_to_save.default.weight", None),
    ],
)
def test_a_block_index_is_read_from_the_name(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer

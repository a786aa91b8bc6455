"""FlatAdapter: one buffer under everything trainable, in a stable order, and loud when the views break."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fibecfed import BrokenViewsError, FlatAdapter
from fibecfed.adapter import layer_of
from fibecfed_kernels import WirePlan
from tests.fibecfed.tiny import KINDS, LAYERS, TARGETS, base, batch, tiny


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


def test_identity_is_of_what_is_computed_and_not_of_where_it_came_from() -> None:
    wanted = dict(FlatAdapter(tiny()).identity)
    moved = tiny()
    moved.config._name_or_path = "/somewhere/else"
    moved.config.id2label = {0: "a", 1: "b", 2: "c"}
    moved.config.pad_token_id = 7
    assert dict(FlatAdapter(moved).identity) == wanted
    compiled = FlatAdapter(torch.compile(moved, backend="eager"))
    assert (compiled.entries, dict(compiled.identity)) == (FlatAdapter(tiny()).entries, wanted)
    for other in (tiny(lora_alpha=9), tiny(use_rslora=True), tiny(target_modules=["query", "key"])):
        identity = FlatAdapter(other).identity
        assert identity["base_model"] == wanted["base_model"]
        assert identity["adapter"] != wanted["adapter"]
    names = ["value", "query", "key", "dense"]  # a set in PEFT, whose order is another one in every process
    adapters = json.loads(FlatAdapter(tiny(target_modules=names)).identity["adapter"])
    assert adapters["default"]["target_modules"] == sorted(names)


def test_without_a_head_its_slices_are_empty() -> None:
    flat = FlatAdapter(get_peft_model(base("bert"), LoraConfig(r=4, target_modules=["query"])))
    assert flat.values(None) == slice(flat.numel, flat.numel)
    assert flat.rows(None) == slice(flat.num_rows, flat.num_rows)


def test_copied_values_are_the_models_and_not_the_callers() -> None:
    model = tiny()
    flat = FlatAdapter(model)
    values = torch.arange(float(flat.numel))
    flat.copy_(values)
    values.zero_()
    flat.check()
    assert torch.equal(
        torch.cat([p.detach().flatten() for _, p in flat.named_views()]), torch.arange(float(flat.numel))
    )
    with pytest.raises(ValueError, match=r"values: \(1,\)"):
        flat.copy_(torch.zeros(1))
    model.double()
    with pytest.raises(BrokenViewsError, match="left the flat buffer"):
        flat.copy_(values)


def test_zero_grad_keeps_the_views() -> None:
    model = tiny()
    flat = FlatAdapter(model)
    model(**batch()).loss.backward()
    flat.zero_grad()
    assert flat.grad.abs().max() == 0
    model.zero_grad()  # sets .grad to None
    flat.data.grad = None
    flat.zero_grad()  # takes them back
    assert flat.data.grad is flat.grad
    parameter = flat.named_views()[1][1]
    parameter.grad = torch.ones_like(parameter)
    flat.zero_grad()
    assert all(p.grad.untyped_storage().data_ptr() == flat.grad.data_ptr() for _, p in flat.named_views())
    model(**batch()).loss.backward()
    flat.check()
    assert flat.grad.abs().max() > 0


def test_zero_grad_refuses_values_that_left_the_buffer() -> None:
    model = tiny()
    flat = FlatAdapter(model)
    model.double()
    with pytest.raises(BrokenViewsError, match="left the flat buffer"):
        flat.zero_grad()


def replace(model: nn.Module) -> None:
    query = model.base_model.model.bert.encoder.layer[1].attention.self.query
    query.lora_A["default"].weight = nn.Parameter(torch.zeros(4, 32))


def new_head(model: nn.Module) -> None:
    model.base_model.model.classifier = nn.Linear(32, 4)


def delete_adapter(model: nn.Module) -> None:
    model.delete_adapter("default")


def reinterpret(model: nn.Module) -> None:
    head = model.base_model.model.classifier.modules_to_save["default"].bias
    head.data = head.data.view(torch.bfloat16)


@pytest.mark.parametrize(
    ("breaks", "match"),
    [
        (lambda m: m.double(), "left the flat buffer"),
        (lambda m: m.to(torch.bfloat16), "left the flat buffer"),
        (replace, r"layer\.1\.attention\.self\.query.*replaced"),
        (new_head, r"base_model\.model\.classifier was replaced"),
        (delete_adapter, r"layer\.0\.attention\.self\.query\.lora_A\.default was replaced in the model, or deleted"),
        (reinterpret, r"classifier.*bias \(torch.bfloat16 on cpu\) left the flat buffer"),
    ],
    ids=["double", "bf16", "replaced", "new head", "deleted", "reinterpreted"],
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


def test_a_bf16_module_casts_what_is_floating_once() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)).bfloat16()
    flat = FlatAdapter(model)
    model(torch.tensor([0, 3])).sum().backward()
    assert flat.grad.abs().max() > 0
    assert [len(module._forward_pre_hooks) for module in model] == [1, 1]


@pytest.mark.parametrize("options", [{"bias": "all"}, {"modules_to_save": ["input_layernorm"]}], ids=str)
def test_what_would_not_fit_its_neighbours_in_float32_is_refused_by_name(options: dict[str, Any]) -> None:
    kind, name = ("bert", "bias") if "bias" in options else ("llama", "input_layernorm")
    lora = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=TARGETS[kind], **options)
    model = get_peft_model(base(kind).bfloat16(), lora)
    before = {name: p.dtype for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=rf"{name}.*: trained in torch\.bfloat16 beside frozen values"):
        FlatAdapter(model)
    assert {name: p.dtype for name, p in model.named_parameters()} == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_bias_trained_beside_a_frozen_weight_in_bfloat16_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).bfloat16()
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"0\.bias: trained in torch\.bfloat16"):
        FlatAdapter(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_copy_is_refused_and_one_of_the_model_is_not(copied: Callable[[object], object]) -> None:
    model = get_peft_model(base("llama").bfloat16(), LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"]))
    flat = FlatAdapter(model)
    with pytest.raises(TypeError, match="a FlatAdapter cannot be copied or pickled; copy or save its model"):
        copied(flat)
    copied(model)


def test_inference_mode_is_refused() -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference mode is on"):
        FlatAdapter(tiny())


def test_scaling_tells_adapters_apart_and_where_a_model_came_from_does_not() -> None:
    plain, scaled = (FlatAdapter(tiny(alpha_pattern=pattern)).identity for pattern in ({}, {"query": 16}))
    assert plain["base_model"] == scaled["base_model"]
    assert plain["adapter"] != scaled["adapter"]
    assert "trainable_token_indices" not in plain["adapter"]
    for change in ({"trainable_token_indices": {"word_embeddings": [3, 4]}}, {"init_lora_weights": "olora"}):
        assert FlatAdapter(tiny(**change)).identity["adapter"] != plain["adapter"]
    assert FlatAdapter(tiny(init_lora_weights="gaussian")).identity == plain
    model = tiny()
    model.config.architectures = ["BertForSequenceClassification"]  # as from_pretrained sets it
    assert dict(FlatAdapter(model).identity) == dict(plain)


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model: NoneType, wanted a torch\.nn\.Module"):
        FlatAdapter(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no trainable parameter"):
        FlatAdapter(base("bert").requires_grad_(False))


def test_a_model_on_two_devices_is_refused() -> None:
    with pytest.raises(ValueError, match=r"trainable parameters on \['cpu', 'meta'\], wanted one device"):
        FlatAdapter(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")))


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_refuses_a_model_that_left_the_buffer_and_identity_outlives_training(kind: str) -> None:
    fresh, used = FlatAdapter(tiny(kind)), tiny(kind)
    used(**batch()).loss.backward()  # sets the configuration's problem_type, for one
    trained = FlatAdapter(used)
    assert dict(trained.identity) == dict(fresh.identity)
    plan = WirePlan(fresh)
    message = plan.pack(trained, round=0, num_samples=1)
    trained.model.half()
    for use in (lambda: plan.pack(trained, round=0, num_samples=1), lambda: plan.load(message, trained)):
        with pytest.raises(BrokenViewsError, match="left the flat buffer"):
            use()

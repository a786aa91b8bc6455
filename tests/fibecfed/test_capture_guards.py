"""Whatever capture_fisher does not understand is refused by name: each guard fires."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from fibecfed import FisherCaptureError, UnsupportedModuleError, capture_fisher
from fibecfed.lora import lora_pairs
from tests.fibecfed.test_capture import assert_close, loop_truth
from tests.fibecfed.tiny import LAYERS, base, batch, fill_b, tiny


def run(model: nn.Module) -> None:
    with capture_fisher(model):
        model(**batch()).loss.backward()


def merged() -> nn.Module:
    model = tiny()
    model.merge_adapter()
    return model


def disabled() -> nn.Module:
    model = tiny()
    model.base_model.disable_adapter_layers()
    return model


def inactive() -> nn.Module:
    model = tiny()
    model.add_adapter("other", LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"]))
    model.base_model.model.bert.encoder.layer[1].attention.self.query._active_adapter = []
    return model


def frozen(side: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = tiny()
        query = model.base_model.model.bert.encoder.layer[1].attention.self.query
        getattr(query, side)["default"].weight.requires_grad_(False)
        return model

    return make


def shared(side: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = tiny()
        first, second = (model.base_model.model.bert.encoder.layer[i].attention.self.query for i in (0, 1))
        getattr(second, side)["default"].weight = getattr(first, side)["default"].weight
        return model

    return make


def two_adapters() -> tuple[nn.Module, LoraLinear]:
    """A model with an idle, frozen second adapter, and one of its queries."""
    model = tiny()
    model.add_adapter("other", LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"]))
    return model, model.base_model.model.bert.encoder.layer[1].attention.self.query


def idle_but_trainable(side: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model, query = two_adapters()
        getattr(query, side)["other"].weight.requires_grad_(True)
        return model

    return make


def none_active() -> nn.Module:
    model, query = two_adapters()
    query._active_adapter = []
    return model.requires_grad_(False)


class Kin(LoraLinear):
    """Another tuner's layer that builds on LoRA's."""


class KinOfLinear(nn.Linear):
    """A linear that may compute anything."""


def kin() -> nn.Module:
    model = tiny()
    model.base_model.model.bert.encoder.layer[1].attention.self.query.__class__ = Kin
    return model


def kin_of_linear() -> nn.Module:
    model = tiny()
    model.base_model.model.bert.encoder.layer[1].attention.self.query.lora_A["default"].__class__ = KinOfLinear
    return model


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: tiny(use_dora=True), r"query.*variant"),
        (merged, r"query.*merged"),
        (disabled, r"query.*disabled"),
        (inactive, r"layer\.1\.attention\.self\.query.*not active"),
        (frozen("lora_A"), r"layer\.1\.attention\.self\.query.*lora_A.*frozen"),
        (frozen("lora_B"), r"layer\.1\.attention\.self\.query.*lora_B.*frozen"),
        (lambda: tiny(lora_bias=True), r"query.*bias"),
        (lambda: tiny(target_modules=["query", "word_embeddings"]), r"word_embeddings.*Embedding.*not supported"),
        (shared("lora_A"), r"layer\.1\.attention\.self\.query.*shares"),
        (shared("lora_B"), r"layer\.1\.attention\.self\.query.*shares"),
        (idle_but_trainable("lora_A"), r"layer\.1\.attention\.self\.query: adapter other is there but not active"),
        (idle_but_trainable("lora_B"), r"layer\.1\.attention\.self\.query: adapter other is there but not active"),
        (kin, r"layer\.1\.attention\.self\.query.*Kin is not supported"),
        (kin_of_linear, r"layer\.1\.attention\.self\.query: lora_A of adapter 'default' is a KinOfLinear"),
    ],
    ids=[
        *("dora", "merged", "disabled", "inactive", "frozen-a", "frozen-b", "bias", "embedding"),
        *("shared-a", "shared-b", "idle-a", "idle-b", "kin", "kin-of-linear"),
    ],
)
def test_a_module_that_is_not_understood_is_refused_by_name(make: Callable[[], nn.Module], match: str) -> None:
    with pytest.raises(UnsupportedModuleError, match=match):
        run(make())


def test_a_module_of_which_no_adapter_is_active_is_refused_though_all_is_frozen() -> None:
    with pytest.raises(UnsupportedModuleError, match=r"adapter default, other is there but not active"):
        lora_pairs(none_active().base_model.model.bert.encoder.layer[1].attention.self)


def test_an_idle_adapter_is_no_hindrance_and_two_active_ones_are_both_seen() -> None:
    model, _ = two_adapters()
    with capture_fisher(model) as fisher:
        model(**batch()).loss.backward()
    assert all(".default." in name for name in fisher.diagonal)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.set_adapter(["default", "other"])
    fill_b(model)
    whole = batch()
    with capture_fisher(model) as fisher:
        model(**whole).loss.backward()
    scores, diagonal = loop_truth(model, whole)
    assert fisher.diagonal.keys() == diagonal.keys()
    assert len(diagonal) == 2 * 4 * LAYERS
    assert_close(fisher.scores, scores)


def test_a_model_without_lora_is_refused() -> None:
    with pytest.raises(TypeError, match="model: NoneType, wanted a PEFT model"):
        run(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no LoRA module"):
        run(base("bert"))


class Twice(nn.Module):
    """Uses one linear twice; ``second`` may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, times: int, second: bool) -> Tensor:
        for _ in range(times):
            x = self.first(x)
        return self.second(x) if second else x


def twice() -> nn.Module:
    model = get_peft_model(Twice(), LoraConfig(r=2, target_modules=["first", "second"]))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.ones_(p)
    return model


def test_a_module_used_twice_in_one_forward_is_refused() -> None:
    model = twice()
    with pytest.raises(FisherCaptureError, match=r"first: seen twice"), capture_fisher(model):
        model(torch.randn(3, 4), times=2, second=True).sum().backward()


def test_a_module_that_was_not_used_is_refused() -> None:
    model = twice()
    with pytest.raises(FisherCaptureError, match=r"1 of 2 .*second"), capture_fisher(model):
        model(torch.randn(3, 4), times=1, second=False).sum().backward()


def test_two_backward_passes_in_one_block_are_refused() -> None:
    model = twice()

    def backward() -> None:
        model(torch.randn(3, 4), times=1, second=True).sum().backward()

    with capture_fisher(model):
        backward()
        with pytest.raises(FisherCaptureError, match="seen twice"):
            backward()


def test_a_forward_outside_the_block_is_refused() -> None:
    model = tiny()
    loss = model(**batch()).loss
    with pytest.raises(FisherCaptureError, match="forward and backward inside"), capture_fisher(model):
        loss.backward()


def test_an_a_whose_output_goes_elsewhere_than_into_b_is_refused() -> None:
    model = twice()
    with (
        pytest.raises(FisherCaptureError, match=r"first: A's output did not go into B alone"),
        capture_fisher(model),
    ):
        model.base_model.model.first.lora_A["default"](torch.randn(3, 4)).sum().backward()


class Regrouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).reshape(-1, 2, 4))


def test_modules_that_disagree_on_the_number_of_samples_are_refused() -> None:
    model = get_peft_model(Regrouped(), LoraConfig(r=2, target_modules=["first", "second"]))
    with (
        pytest.raises(FisherCaptureError, match=r"saw 2 samples where .*first saw 4|saw 4 samples where .* saw 2"),
        capture_fisher(model),
    ):
        model(torch.randn(4, 4)).sum().backward()


def test_blocks_do_not_nest() -> None:
    model = tiny()
    with capture_fisher(model) as outer:
        with pytest.raises(FisherCaptureError, match="nested"), capture_fisher(model):
            pass
        model(**batch()).loss.backward()
    assert torch.isfinite(outer.scores).all()


def test_results_before_the_end_of_the_block_are_refused() -> None:
    model = tiny()
    with capture_fisher(model) as fisher:
        with pytest.raises(FisherCaptureError, match="not there yet"):
            _ = fisher.scores
        model(**batch()).loss.backward()


BAD = [
    {"reduction": "none"},
    {"loss_scale": 1e-10},
    {"loss_scale": float("inf")},
    {"loss_scale": "2"},
    {"cu_seqlens": [0]},
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_arguments_are_refused_by_name(bad: dict[str, object]) -> None:
    with pytest.raises((ValueError, TypeError), match=f"{next(iter(bad))}: "):
        capture_fisher(tiny(), **bad)  # type: ignore[arg-type]


def test_another_number_of_samples_than_said_is_refused() -> None:
    model = tiny()
    with capture_fisher(model, num_samples=5):
        model(**batch()).loss.backward()
    words = r"saw 5 samples, wanted 4 \(num_samples\).*first axis"
    with pytest.raises(FisherCaptureError, match=words), capture_fisher(model, num_samples=4):
        model(**batch()).loss.backward()


def test_an_adapter_for_each_sample_is_refused_and_leaves_nothing_behind() -> None:
    model = tiny()
    model.add_adapter("other", LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"]))
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.set_adapter(["default", "other"])
    names = ["default", "other"] * 2
    with pytest.raises(FisherCaptureError, match="query: adapter_names, an adapter for"), capture_fisher(model.eval()):
        model(**batch(4), adapter_names=names).loss.backward()
    run(model)


def test_inference_mode_is_refused() -> None:
    with torch.inference_mode(), pytest.raises(FisherCaptureError, match="inference mode is on"):
        run(tiny())

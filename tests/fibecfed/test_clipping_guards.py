"""Whatever clip_sample_gradients cannot clip is refused by name, and leaves no gradient behind."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.tensor import DeviceMesh, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

from fibecfed import FisherCaptureError, UnsupportedModuleError, clip_sample_gradients
from fibecfed.losses import classification_loss
from tests.fibecfed.test_capture import assert_close
from tests.fibecfed.test_clipping import Packed, own_gradients, squared_norms, trained
from tests.fibecfed.tiny import HIDDEN, batch, tiny


def trainable_norm() -> nn.Module:
    model = tiny()
    model.base_model.model.bert.encoder.layer[1].output.LayerNorm.weight.requires_grad_(True)
    return model


def trainable_embedding() -> nn.Module:
    model = tiny()
    model.base_model.model.bert.embeddings.word_embeddings.weight.requires_grad_(True)
    return model


def shared_head() -> nn.Module:
    model = tiny()
    head = model.base_model.model.classifier.modules_to_save["default"]
    other = nn.Linear(head.in_features, head.out_features)
    other.weight = head.weight
    model.base_model.model.other = other
    return model


def mixing() -> nn.Module:
    model = tiny()
    model.base_model.model.norm = nn.BatchNorm1d(3, affine=False)
    return model


def mixing_in_eval() -> nn.Module:
    model = tiny()
    model.base_model.model.norm = nn.BatchNorm1d(3, affine=False, track_running_stats=False)
    return model.eval()


def mixing_over_time() -> nn.Module:
    model = tiny()
    model.base_model.model.norm = nn.InstanceNorm1d(3, track_running_stats=True)
    return model.train()


def head_of(model: nn.Module) -> nn.Linear:
    return model.base_model.model.classifier.modules_to_save["default"]


def added_parameter() -> nn.Module:
    model = tiny()
    head_of(model).gain = nn.Parameter(torch.ones(3))
    return model


def normed_head() -> nn.Module:
    model = tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(head_of(model))
    return model


def pruned_lora() -> nn.Module:
    model = tiny()
    query = model.base_model.model.bert.encoder.layer[1].attention.self.query
    prune.l1_unstructured(query.lora_A["default"], "weight", 0.3)
    return model


class Wider(nn.Linear):
    """A linear module that may do anything."""


def other_linear() -> nn.Module:
    model = tiny()
    model.base_model.model.extra = Wider(2, 2)
    return model


def head_that_shares_lora() -> nn.Module:
    model = tiny()
    query = model.base_model.model.bert.encoder.layer[1].attention.self.query
    model.base_model.model.extra = nn.Linear(HIDDEN, 4)
    model.base_model.model.extra.weight = query.lora_A["default"].weight
    return model


def lone_parameter() -> nn.Module:
    model = tiny()
    model.base_model.model.prompt = nn.Parameter(torch.zeros(2))
    return model


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (trainable_norm, r"layer\.1\.output\.LayerNorm\.weight: trainable in a LayerNorm"),
        (trainable_embedding, r"word_embeddings\.weight: trainable in a Embedding"),
        (shared_head, r"other\.weight: shared with another trainable module"),
        (mixing, r"norm: BatchNorm1d mixes the samples"),
        (mixing_in_eval, r"norm: BatchNorm1d mixes the samples"),
        (mixing_over_time, r"norm: InstanceNorm1d mixes the samples"),
        (added_parameter, r"classifier.*has the parameters weight, bias, gain"),
        (normed_head, r"classifier.*has the parameters bias, weight_g, weight_v"),
        (pruned_lora, r"layer\.1\.attention\.self\.query: lora_A.*has the parameters weight_orig"),
        (other_linear, r"extra\.weight: trainable in a Wider"),
        (head_that_shares_lora, r"extra\.weight: shared with another trainable module"),
        (lone_parameter, r"prompt: trainable in a BertForSequenceClassification"),
    ],
)
def test_what_cannot_be_clipped_is_refused_by_name(make: Callable[[], nn.Module], wanted: str) -> None:
    model = make()
    with pytest.raises(UnsupportedModuleError, match=wanted):
        clip_sample_gradients(model, 1.0).__enter__()
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_batch_norm_that_stands_still_mixes_nothing() -> None:
    model, whole = tiny(), batch()
    model.base_model.model.norm = nn.BatchNorm1d(3, affine=False)
    model.eval()
    with clip_sample_gradients(model, 1.0) as clipped:
        model(**whole).loss.backward()
    assert_close(clipped.scores, squared_norms(own_gradients(tiny(), whole)))


@pytest.mark.usefixtures("process_group")
def test_a_sharded_head_is_refused() -> None:
    model = tiny()
    weight = distribute_tensor(head_of(model).weight.data, DeviceMesh("cpu", [0]))
    head_of(model).weight = nn.Parameter(weight)
    with pytest.raises(UnsupportedModuleError, match=r"classifier.*weight is sharded"):
        clip_sample_gradients(model, 1.0).__enter__()


@pytest.mark.parametrize("which", ["head", "lora"])
def test_a_gradient_past_the_module_is_refused_and_leaves_nothing(which: str) -> None:
    """It would be in .grad as it is: neither clipped nor counted in a sample's norm."""
    model, whole = tiny(), batch()
    query = model.base_model.model.bert.encoder.layer[1].attention.self.query
    weight = head_of(model).weight if which == "head" else query.lora_A["default"].weight
    name = "classifier" if which == "head" else r"layer\.1\.attention\.self\.query\.lora_A"
    with (
        pytest.raises(FisherCaptureError, match=rf"{name}.*past its module"),
        clip_sample_gradients(model, 1.0),
    ):
        (model(**whole).loss + weight.square().sum()).backward()
    assert all(p.grad is None for p in trained(model).values())
    (model(**whole).loss + weight.square().sum()).backward()  # outside of the block it is nobody's concern


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel_is_refused() -> None:
    with pytest.raises(UnsupportedModuleError, match="DistributedDataParallel"):
        clip_sample_gradients(DistributedDataParallel(tiny()), 1.0).__enter__()


def test_a_head_without_a_backward_or_used_twice_is_refused_by_name() -> None:
    model, whole = tiny(), batch()
    model.base_model.model.spare = nn.Linear(2, 2)
    with (
        pytest.raises(FisherCaptureError, match=r"1 of 2 trainable linear modules had no backward.*\.spare"),
        clip_sample_gradients(model, 1.0),
    ):
        model(**whole).loss.backward()
    del model.base_model.model.spare
    head = model.base_model.model.classifier
    pooled = torch.randn(5, head.in_features)
    with (
        pytest.raises(FisherCaptureError, match=r"classifier.*seen twice"),
        clip_sample_gradients(model, 1.0),
    ):
        (model(**whole).loss + head(pooled).sum()).backward()
    assert all(p.grad is None for p in trained(model).values())


def test_a_gradient_that_is_not_finite_is_refused_with_its_sample() -> None:
    model, whole = tiny(), batch()
    weight = torch.tensor([1.0, 1.0, float("inf"), 1.0, 1.0])
    with pytest.raises(ValueError, match=r"sample 2 of the batch: not finite"), clip_sample_gradients(model, 1.0):
        (weight * classification_loss(model, whole)).sum().backward()
    assert all(p.grad is None for p in trained(model).values())


def test_rows_that_may_be_tokens_or_samples_are_refused() -> None:
    model = get_peft_model(Packed(), LoraConfig(r=2, target_modules=["first"], modules_to_save=["second", "third"]))
    segments, cu_seqlens = torch.tensor([0, 0, 2]), torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    x = torch.randn(1, 3, 6)
    with (
        pytest.raises(FisherCaptureError, match=r"its 3 rows may be the tokens or the samples"),
        clip_sample_gradients(model, 1.0, "sum", cu_seqlens=cu_seqlens),
    ):
        model(x, segments).sum().backward()


@pytest.mark.parametrize(("loss_scale", "wanted"), [(1e-9, "loss_scale: 1e-09 makes gradients"), (1e25, "not finite")])
def test_a_loss_scaled_out_of_the_range_of_squares_is_refused(loss_scale: float, wanted: str) -> None:
    model, whole = tiny(), batch()
    with pytest.raises(ValueError, match=wanted), clip_sample_gradients(model, 1e-6, loss_scale=loss_scale):
        (model(**whole).loss * loss_scale).backward()
    assert all(p.grad is None for p in trained(model).values())


def test_a_head_without_an_axis_for_samples_is_refused() -> None:
    model = get_peft_model(Packed(), LoraConfig(r=2, target_modules=["first"], modules_to_save=["second"]))
    base = model.base_model.model
    with (
        pytest.raises(FisherCaptureError, match=r"second.*its input is \(8,\)"),
        clip_sample_gradients(model, 1.0, "sum"),
    ):
        base.second(base.first(torch.randn(6))).sum().backward()


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("inf"), float("nan"), 10**400])
def test_a_norm_that_is_no_positive_number_is_refused(max_norm: float) -> None:
    with pytest.raises(ValueError, match="max_norm"):
        clip_sample_gradients(tiny(), max_norm)


def test_results_are_refused_before_the_end_and_after_an_error() -> None:
    model, whole = tiny(), batch()
    clipped = clip_sample_gradients(model, 1.0)
    for name in ("scores", "factors"):
        with pytest.raises(FisherCaptureError, match=f"{name}: not there yet"):
            getattr(clipped, name)

    def fail() -> None:
        with clipped:
            model(**whole).loss.backward()
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert not clipped._kept
    assert all(p.grad is None for p in trained(model).values())

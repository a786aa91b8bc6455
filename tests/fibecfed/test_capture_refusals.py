"""Models and inputs that are refused by what is the matter with them, and not by what comes of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from peft import IA3Config, get_peft_model
from torch import Tensor, nn

from fibecfed import (
    FisherCaptureError,
    NotFiniteScoresError,
    UnsupportedModuleError,
    capture_fisher,
    score_samples,
)
from tests.fibecfed.test_sample_axis import loss, model_of, plain, samples
from tests.fibecfed.tiny import base, batch, tiny


def replaced(model: nn.Module) -> nn.Module:
    """As accelerate's hooks do it."""
    query = model.base_model.model.bert.encoder.layer[1].attention.self.query
    linear = query.lora_B["default"]
    linear.forward = partial(type(linear).forward, linear)
    return model


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (replaced, r"layer\.1\.attention\.self\.query\.lora_B\.default: its forward was replaced \(accelerate"),
        (
            lambda model: model.double(),
            r"query: lora_A of adapter 'default' is torch\.float64, wanted torch\.float32, ",
        ),
    ],
    ids=["replaced", "float64"],
)
def test_a_model_is_refused_on_entry(change: Callable[[nn.Module], nn.Module], words: str) -> None:
    model = change(tiny())
    with pytest.raises(UnsupportedModuleError, match=words), capture_fisher(model):
        raise AssertionError("not reached")


def test_an_input_without_an_axis_for_samples_is_refused_by_its_module() -> None:
    model = model_of(lambda net, x: net.b(net.a(x[0, 0])).expand(x.shape))
    words = r"b: its input is \(8,\), wanted the samples on an axis"
    with pytest.raises(FisherCaptureError, match=words), capture_fisher(model, "sum"):
        loss(model, samples()).sum().backward()


def test_batches_that_are_no_dicts_are_refused() -> None:
    given = batch()
    for bad in (list(given.values()), tuple(given.values()), None):
        with pytest.raises(TypeError, match=rf"loader: gave a batch that is a {type(bad).__name__}, wanted a dict"):
            score_samples(tiny(), [bad])  # type: ignore[list-item]


def test_scores_that_are_not_finite_are_refused_by_their_samples() -> None:
    given = samples(5)
    given["x"][[1, 3]] = float("nan")
    with pytest.raises(
        NotFiniteScoresError, match=r"^loader: the score of sample \(in its order\) 5, 7 is not finite"
    ) as found:
        score_samples(model_of(plain), [samples(4), given], sample_loss=loss)
    assert found.value.samples == [5, 7]


def test_blocks_of_two_stacks_are_not_added_up() -> None:
    model = tiny()
    found = score_samples(model, [batch()])
    assert sorted(found.layer_scores()) == [0, 1, 2]
    twice: dict[str, Tensor] = dict(found.module_scores)
    twice |= {name.replace("encoder", "decoder"): part for name, part in found.module_scores.items()}
    with pytest.raises(ValueError, match="trainable blocks in 2 stacks"):
        found._replace(module_scores=twice).layer_scores()
    assert torch.equal(found._replace(module_scores={"classifier": found.scores}).layer_scores()[None], found.scores)


def test_a_loss_that_reads_a_weight_past_its_module_is_not_scored() -> None:
    def decayed(model: nn.Module, given: Mapping[str, Tensor]) -> Tensor:
        return loss(model, given) + model.get_parameter("base_model.model.b.lora_B.default.weight").square().sum()

    with pytest.raises(FisherCaptureError, match=r"b\.lora_B\.default\.weight: has a gradient past its module"):
        score_samples(model_of(plain), [samples()], sample_loss=decayed)


def test_a_copy_made_inside_a_block_is_refused_and_leaves_nothing_behind() -> None:
    model = tiny()
    with pytest.raises(FisherCaptureError, match="copied inside a block"), capture_fisher(model):
        copy.deepcopy(model)
    with capture_fisher(copy.deepcopy(model)) as fisher:
        fisher.model(**batch()).loss.backward()
    assert fisher.scores.min() > 0


def test_an_adapter_of_another_kind_is_named() -> None:
    model = get_peft_model(base("bert"), IA3Config(target_modules=["query"], feedforward_modules=[]))
    with pytest.raises(ValueError, match=r"model: no LoRA module found \(its adapters: IA3Config\); wrap it"):
        capture_fisher(model).__enter__()


def test_a_module_behind_a_pooling_of_packed_tokens_is_refused_by_its_name() -> None:
    model = model_of(lambda net, x: net.b(net.a(x).reshape(2, 3, -1).mean(1))[:, None])
    ends = torch.tensor([0, 3, 6], dtype=torch.int32)
    words = r"b: saw 2 tokens where cu_seqlens ends at 6; a module behind a pooling wants no adapter"
    with pytest.raises(FisherCaptureError, match=words), capture_fisher(model, "sum", cu_seqlens=ends):
        model(x=torch.randn(1, 6, 8)).logits.sum().backward()

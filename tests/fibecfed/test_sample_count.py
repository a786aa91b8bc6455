"""The number of samples, as the model's input tells it: under any name, or asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from peft import PeftModel
from torch import Tensor, nn

from fibecfed import FisherCaptureError, capture_fisher
from tests.fibecfed.test_sample_axis import model_of, plain, samples


def channels(net: nn.Module, x: Tensor) -> Tensor:
    """Each channel as a sample of its own, as PatchTST does."""
    return net.b(net.a(x.flatten(0, 1))).view_as(x)


def named(net: PeftModel, x: Tensor) -> Tensor:
    return net(x=x).logits


def inner(net: PeftModel, x: Tensor) -> Tensor:
    return net.get_base_model()(x).logits


@pytest.mark.parametrize("call", [named, inner])
def test_samples_are_counted_under_any_name_and_when_the_inner_model_is_called(
    call: Callable[[PeftModel, Tensor], Tensor],
) -> None:
    model = model_of(channels)
    words = r"[ab]: saw 20 samples, wanted 5 \(the first axis"
    with pytest.raises(FisherCaptureError, match=words), capture_fisher(model, "sum"):
        call(model, samples(5)["x"]).sum().backward()


def test_where_the_samples_cannot_be_counted_their_number_is_asked_for() -> None:
    model = model_of(plain)

    def run() -> None:
        inside = model.base_model.model
        inside.head(inside.way(inside, samples(5)["x"])).sum().backward()

    words = "capture_fisher: the number of samples cannot be seen"
    with pytest.raises(FisherCaptureError, match=words), capture_fisher(model, "sum"):
        run()
    with capture_fisher(model, "sum", num_samples=5) as fisher:
        run()
    assert fisher.scores.shape == (5,)

"""Captures under data parallelism, torch.compile and gradient accumulation; sharded weights are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DeviceMesh, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fibecfed import UnsupportedModuleError, capture_fisher, score_samples
from tests.fibecfed.test_capture import assert_close, loop_truth, lora_parameters
from tests.fibecfed.test_sample_axis import loss, model_of, plain, samples
from tests.fibecfed.tiny import batch, tiny


@pytest.mark.usefixtures("process_group")
def test_a_model_in_distributed_data_parallel_is_scored_as_it_is_alone() -> None:
    """In one process: the wrapper's hooks and names are there, the exchange between processes is not."""
    model, whole = tiny(), batch(samples=6)
    scores, diagonal = loop_truth(model, whole)
    wrapped = DistributedDataParallel(model)
    wrapped(**whole).loss.backward()
    ordinary = {name: p.grad.clone() for name, p in lora_parameters(model).items() if p.grad is not None}
    wrapped.zero_grad()
    with capture_fisher(wrapped) as fisher:
        wrapped(**whole).loss.backward()
    assert_close(fisher.scores, scores)
    for name, value in diagonal.items():
        assert_close(fisher.diagonal[name], value)
        gradient = lora_parameters(model)[name].grad
        assert gradient is not None
        assert_close(gradient, ordinary[name].double(), 1e-5)


@pytest.mark.usefixtures("process_group")
def test_a_sharded_weight_is_refused_by_name() -> None:
    model, mesh = tiny(), DeviceMesh("cpu", [0])
    query = model.base_model.model.bert.encoder.layer[1].attention.self.query
    query.lora_B["default"].weight = nn.Parameter(distribute_tensor(query.lora_B["default"].weight.data, mesh))
    with pytest.raises(UnsupportedModuleError, match=r"layer\.1\.attention\.self\.query.*lora_B.*sharded"):
        capture_fisher(model).__enter__()


def test_a_compiled_model_is_scored_as_it_is_uncompiled() -> None:
    """Compiled before and inside a block, and run again outside: no graph may hold on to what a block had put there."""
    model = model_of(plain)
    compiled, given = torch.compile(model, backend="eager"), samples()
    alone = loss(compiled, given)
    for n in (4, 3):
        part = samples(n)
        with capture_fisher(model, "sum") as wanted:
            loss(model, part).sum().backward()
        with capture_fisher(compiled, "sum") as fisher:
            loss(compiled, part).sum().backward()
        assert_close(fisher.scores, wanted.scores.double())
        assert list(fisher.diagonal) == list(wanted.diagonal), "names are those of the model inside"
        assert_close(score_samples(compiled, [part], sample_loss=loss).scores, wanted.scores.double())
    torch.testing.assert_close(loss(compiled, given), alone)


def test_gradients_accumulate_over_captures_as_they_do_without() -> None:
    model, parts = tiny(), [batch(seed=s) for s in (3, 4)]
    for part in parts:
        (model(**part).loss / len(parts)).backward()
    ordinary = {name: p.grad.clone() for name, p in lora_parameters(model).items() if p.grad is not None}
    model.zero_grad()
    for part in parts:
        with capture_fisher(model, loss_scale=1 / len(parts)) as fisher:
            (model(**part).loss / len(parts)).backward()
        assert_close(fisher.scores, loop_truth(model, part)[0])
    for name, p in lora_parameters(model).items():
        assert p.grad is not None
        assert_close(p.grad, ordinary[name].double(), 1e-5)

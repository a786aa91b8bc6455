"""The exported adapter, value by value, and what its last upload costs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from fibecfed import FlatAdapter
from fibecfed.export import export_adapter
from fibecfed.federation import Federation
from fibecfed.fleet import LocalFleet
from fibecfed_kernels import WirePlan

from .federated import SIZES, buffer, federation, halves
from .tiny import base

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(rounds: tuple[int, ...], *overrides: str) -> Federation:
    fed = federation(*overrides)
    for device, participations in zip(fed.devices, rounds, strict=True):
        device.rounds = participations
    return fed


def exported_values(folder: Path) -> torch.Tensor:
    return FlatAdapter(PeftModel.from_pretrained(base("bert"), folder, is_trainable=True)).data.detach()


def test_the_adapter_is_the_servers_with_the_mean_of_the_local_layers_that_were_trained(tmp_path: Path) -> None:
    fed = trained((2, 0, 1))
    server, store = halves(fed)
    fed.flat.copy_(torch.full_like(fed.flat.data, 9.0))
    exported = export_adapter(LocalFleet(fed, store=store), server, tmp_path / "adapter")
    mean = (SIZES[0] * store.rows[0] + SIZES[2] * store.rows[2]) / (SIZES[0] + SIZES[2])
    torch.testing.assert_close(exported_values(exported.path), buffer(fed, server, mean))
    assert exported.bytes_up == 2 * WirePlan(fed.flat, [0, 2], dtype="float32").nbytes
    assert (exported.path / "tokenizer.json").is_file()


def test_the_last_upload_is_of_the_wires_dtype_and_only_the_local_layers_are_rounded_by_it(tmp_path: Path) -> None:
    fed = trained((1, 1, 1), "wire.dtype=int8")
    server, store = halves(fed)
    exported = export_adapter(LocalFleet(fed, store=store), server, tmp_path / "adapter")
    assert exported.bytes_up == 3 * WirePlan(fed.flat, [0, 2], dtype="int8").nbytes
    values, exact = exported_values(exported.path), buffer(fed, server, store.initial)
    for layer in (1, None):
        assert torch.equal(values[fed.flat.values(layer)], exact[fed.flat.values(layer)])
    mean = (torch.tensor(SIZES) / sum(SIZES)) @ store.rows
    torch.testing.assert_close(values, buffer(fed, server, mean), rtol=0, atol=0.05)


def test_where_no_device_trained_the_local_layers_are_the_initial_ones_and_nothing_is_sent(tmp_path: Path) -> None:
    fed = trained((0, 0, 0))
    server, store = halves(fed)
    fed.flat.copy_(torch.full_like(fed.flat.data, 9.0))
    exported = export_adapter(LocalFleet(fed, store=store), server, tmp_path / "adapter")
    assert torch.equal(exported_values(exported.path), buffer(fed, server, store.initial))
    assert exported.bytes_up == 0


def test_where_every_layer_travels_the_adapter_is_the_servers_and_nothing_is_sent(tmp_path: Path) -> None:
    fed = trained((1, 1, 1))
    server, store = halves(fed, gal=(0, 1, 2))
    fed.flat.copy_(torch.full_like(fed.flat.data, 9.0))
    exported = export_adapter(LocalFleet(fed, store=store), server, tmp_path / "adapter")
    assert torch.equal(exported_values(exported.path), server.values)
    assert exported.bytes_up == 0

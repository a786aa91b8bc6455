"""Drawing, broadcasting and averaging, and the store of local layers, value by value."""

from __future__ import annotations

import pytest
import torch

from fibecfed import BrokenViewsError
from fibecfed.sections import Wire
from fibecfed.server import LocalStore, Server, Upload
from fibecfed_kernels import WireError

from .federated import buffer, federation, halves

pytestmark = pytest.mark.usefixtures("one_thread")


def test_devices_are_drawn_by_seed_and_round_without_replacement_in_order() -> None:
    flat = federation().flat
    server, other = Server(flat, (1,), Wire(), 3), Server(flat, (1,), Wire(), 4)
    drawn = [server.draw(t, 20, 7) for t in range(1, 20)]
    assert drawn == [server.draw(t, 20, 7) for t in range(1, 20)]
    assert all(sorted(set(devices)) == devices and len(devices) == 7 for devices in drawn)
    assert {k for devices in drawn for k in devices} == set(range(20))
    assert len({tuple(devices) for devices in drawn}) == len(drawn)
    assert drawn != [other.draw(t, 20, 7) for t in range(1, 20)]


def test_a_broadcast_is_the_servers_values_whatever_the_buffer_held() -> None:
    fed = federation()
    server, store = halves(fed)
    fed.flat.copy_(torch.full_like(fed.flat.data, 9.0))
    message = server.broadcast(5)
    store.load(2)
    fed.flat.data.data[fed.flat.values(1)] = 9.0
    server.down.load(message, fed.flat, round=5)
    assert torch.equal(fed.flat.data.detach(), buffer(fed, server, store.rows[2]))
    with pytest.raises(WireError, match="round"):
        server.down.load(message, fed.flat, round=4)


def test_the_mean_of_uploads_is_weighted_and_of_this_round_alone() -> None:
    fed = federation()
    server, _ = halves(fed)
    first, second = torch.randn_like(server.values), torch.randn_like(server.values)

    def upload(device: int, values: torch.Tensor, round_: int) -> Upload:
        server.up.scatter_(values, fed.flat)
        return Upload(device, server.up.pack(fed.flat, round=round_, num_samples=1))

    sizes = [9, 1, 9, 3, 5]
    assert server.average((upload(*one, 2) for one in ((1, first), (3, second))), sizes, 2) == {}
    mean = (first + 3 * second) / 4
    torch.testing.assert_close(server.values, mean)
    broken, silent = upload(4, first, 2), Upload(0, problem="no answer")
    assert broken.message is not None
    broken.message[-1] ^= 1
    refused = server.average([upload(3, first, 1), silent, upload(2, second, 2), broken], sizes, 2)
    assert list(refused) == [0, 3, 4]
    assert refused[0] == "no answer"
    assert refused[3] == "metadata.round: 1, wanted 2"
    assert "CRC32C" in refused[4]
    torch.testing.assert_close(server.values, second)
    before = server.values
    for nothing in ([broken, upload(3, first, 1)], [silent], []):
        assert server.average(nothing, sizes, 2).keys() == {one.device for one in nothing}
        assert server.values is before


def test_every_device_keeps_its_own_local_layers_and_the_initial_ones_stay() -> None:
    fed = federation()
    flat, before = fed.flat, fed.flat.data.detach().clone()
    store = LocalStore(flat, (1,), 3)
    local = torch.cat([before[flat.values(0)], before[flat.values(2)]])
    assert torch.equal(store.rows, local.expand(3, -1))
    for k in (0, 2):
        flat.copy_(before + (k + 1))
        store.save(k)
    assert torch.equal(store.initial, local)
    assert torch.equal(store.rows, torch.stack([local + 1, local, local + 3]))
    for k, shift in ((2, 3.0), (0, 1.0), (1, 0.0)):
        flat.copy_(torch.full_like(before, 9.0))
        store.load(k)
        wanted = before + shift
        wanted[flat.values(1)] = wanted[flat.values(None)] = 9.0
        assert torch.equal(flat.data.detach(), wanted)
    store.load(2)
    store.reset()
    assert torch.equal(torch.cat([flat.data.detach()[flat.values(layer)] for layer in (0, 2)]), local)


def test_a_model_that_left_the_buffer_is_refused() -> None:
    fed = federation()
    server, store = halves(fed)
    fed.flat.model.double()
    for write in (server.put, store.reset, lambda: store.load(0), lambda: server.broadcast(1)):
        with pytest.raises(BrokenViewsError):
            write()


def test_differences_are_to_what_was_received_and_what_a_message_loses_comes_with_the_next() -> None:
    fed = federation("wire.dtype=int4", "wire.down_dtype=bfloat16", "wire.delta=true", "wire.error_feedback=true")
    server, _ = halves(fed)
    flat, plan = fed.flat, server.up
    server.down.load(server.broadcast(3), flat)
    received = server.down.gather(flat)
    assert server.base is not None
    assert torch.equal(server.base, received)
    assert not torch.equal(received, server.values)  # bfloat16
    change, residual = 0.01 * torch.randn(plan.numel), torch.zeros(plan.numel)
    server.down.scatter_(received + change, flat)
    uploads = [
        Upload(k, plan.pack(flat, round=3, num_samples=1, base=server.base, residual=residual)) for k in range(2)
    ]
    server.average(uploads, [1, 1], 3)
    torch.testing.assert_close(server.values, received + change - residual / 2, rtol=0, atol=1e-5)
    assert residual.any()


def test_feedback_without_differences_is_refused_and_int4_is_for_devices() -> None:
    with pytest.raises(ValueError, match="error_feedback is for differences"):
        Wire(error_feedback=True)
    assert Wire(dtype="int4").down == "float32"
    assert Wire(dtype="int8").down == "int8"
    assert Wire(dtype="int8", down_dtype="bfloat16").down == "bfloat16"
    with pytest.raises(ValueError, match="down_dtype"):
        Wire(down_dtype="int4")  # type: ignore[arg-type]

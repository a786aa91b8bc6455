"""What the wire is compared with gives the tensors back, averages right, and is measured on what it should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from benchmarks import test_wire as suite
from benchmarks import wire_peers
from benchmarks.adapters import Adapter, Model
from benchmarks.comparison import Provider, Work, relative_error
from benchmarks.wire_peers import Pushed, mean_by_hand, ways

pytestmark = pytest.mark.filterwarnings("ignore:flwr is not installed")
CPU = torch.device("cpu")
TINY = Model("tiny", 4, 24, 2)
INSTALLED = ["safetensors", "torch.save"]
if find_spec("flwr") is not None:
    INSTALLED += ["Flower, ArrayRecord", "Flower, ndarrays_to_parameters"]


def state(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {name: tensor.clone() for name, tensor in Adapter(TINY, CPU).tensors().items()}


def size(message: Any) -> int:
    return sum(map(len, message.objects.values())) if isinstance(message, Pushed) else len(message)


def test_all_that_is_installed_is_compared() -> None:
    assert list(ways()) == INSTALLED


@pytest.mark.parametrize("name", INSTALLED)
def test_every_way_gives_the_tensors_back_and_sends_them_once(name: str) -> None:
    way, sent = ways()[name], state()
    sent["twice"] = sent["p0"].clone()  # equal tensors are tensors of their own
    message = way.encode(sent)
    found = way.decode(way.relay(message), list(sent))
    assert found.keys() == sent.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in sent.items())
    values = sum(tensor.nbytes for tensor in state().values())
    assert values <= size(message) < values + 1500 * len(sent)


def test_the_mean_by_hand_is_that_of_float64_and_leaves_the_messages_alone() -> None:
    states, counts = [state(seed) for seed in range(3)], [5, 1, 30]
    files = [safetensors.torch.save(s) for s in states]
    truth = {k: sum(n * s[k].double() for n, s in zip(counts, states, strict=True)) / 36 for k in states[0]}
    for _ in range(2):
        found = mean_by_hand(iter(files), counts)
        assert found.keys() == truth.keys()
        assert relative_error([found[name] for name in truth], list(truth.values())) < 1e-6


def test_peers_get_what_travels_in_memory_of_its_own() -> None:
    adapter = Adapter(TINY, CPU)
    plan = suite.plans_of(adapter, 2)["float32"]
    views = suite.travelling(adapter, plan)
    assert list(views) == list(plan.names) == [f"p{i}" for i in (0, 1, 2, 3, 8, 9, 10, 11)]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in suite.own(views).values())


def test_a_warning_says_that_flower_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_peers, "find_spec", lambda name: None)
    with pytest.warns(
        UserWarning, match=r"^flwr is not installed, so Flower is left out: it comes with the extra \[flower\]$"
    ):
        assert list(ways()) == ["safetensors", "torch.save"]


class Checked:
    """In the place of a comparison: what each provider computes is looked at, nothing is timed."""

    def __init__(self) -> None:
        self.work: Work | None = None
        self.errors: dict[str, float | None] = {}

    def __call__(
        self, work: Work, providers: Mapping[str, Provider], tolerance: float, modes: Sequence[str] = ()
    ) -> list[Any]:
        self.work = work
        for _ in range(2):  # a call that destroys what it reads would be wrong the second time
            self.errors = {name: self._error(provider) for name, provider in providers.items()}
            wrong = {name: error for name, error in self.errors.items() if not (error is None or error <= tolerance)}
            assert not wrong
        return []

    @staticmethod
    def _error(provider: Provider) -> float | None:
        found = provider.call()
        return None if provider.error is None else provider.error(found)


OURS = ["fibecfed float32", "fibecfed bfloat16", "fibecfed int8", "fibecfed int4"]


@pytest.mark.parametrize("every", [1, 2])
def test_who_packs_and_who_loads(every: int) -> None:
    checked = Checked()
    suite.test_pack(checked, CPU, TINY, every)  # type: ignore[arg-type]
    assert list(checked.errors) == [*OURS, *INSTALLED, "memcpy, no message"]
    unchecked = [name for name, error in checked.errors.items() if error is None]
    assert unchecked == ["fibecfed int8", "fibecfed int4", "memcpy, no message"]
    bytes_moved = 8 * sum(e.numel for e in TINY.entries) // every
    assert checked.work == Work("wire: pack", f"tiny r=2, {suite.SHARES[every]}", torch.float32, bytes_moved)
    suite.test_load(checked, CPU, TINY, every)  # type: ignore[arg-type]
    views = "fibecfed float32, unpack: views, no copy"
    assert list(checked.errors) == [*OURS, views, *INSTALLED, "memcpy, no message"]
    assert [name for name, error in checked.errors.items() if error is None] == ["memcpy, no message"]
    assert checked.work == Work("wire: load", f"tiny r=2, {suite.SHARES[every]}", torch.float32, bytes_moved)


@pytest.mark.parametrize("way", INSTALLED)
def test_who_loads_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    idle = wire_peers.Way(ways()[way].encode, lambda message, names: {})
    monkeypatch.setattr(suite, "ways", lambda: {way: idle})
    with pytest.raises(AssertionError, match=f"'{way}': 1.0"):
        suite.test_load(Checked(), CPU, TINY, 1)  # type: ignore[arg-type]


def test_who_averages() -> None:
    checked = Checked()
    suite.test_aggregate(checked, CPU, TINY)  # type: ignore[arg-type]
    flower = ["Flower, pull + FedAvg", "Flower, FedAvg of what was pulled"] if len(INSTALLED) > 2 else []
    ours = ["fibecfed", "fibecfed, one by one from a generator", "fibecfed, new memory"]
    assert list(checked.errors) == [*ours, "safetensors.torch.load + add_ by tensor", *flower]
    assert None not in checked.errors.values()

"""Nodes that are missing, do not fit, fail, or send nonsense: who and why is said, and the run goes on where it can."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message

from fibecfed.config import ConfigError
from fibecfed.flower.fleet import FleetError
from fibecfed.record import RunRecord

from ..small_run import config
from .grid import LocalGrid
from .running import adapter, flat, parts, serve

pytestmark = pytest.mark.usefixtures("one_thread")
Spoil = Callable[[Message], Message | None]
QUICK = ["gal.selection=first", "gal.spectrum=false"]


def run(
    sources: tuple[Path, Path], out: Path, kind: str, spoil: Spoil, nodes: tuple[int, ...], *overrides: str
) -> RunRecord:
    """A run in which the answers of some nodes to one kind of question are spoilt."""
    settings = config(sources, out, *QUICK, "train.rounds=2", "train.per_round=4", *overrides)

    def maybe(node: int, reply: Message) -> Message | None:
        return spoil(reply) if node - 100 in nodes and reply.metadata.message_type == kind else reply

    return serve(LocalGrid(flat(settings), parts(0, 1, 2, 3), maybe), settings, timeout=0.2)


def lost(reply: Message) -> None:
    return None


def failed(reply: Message) -> Message:
    return Message(Error(code=3, reason="<class 'ValueError'>:<'two\nlines'>"), reply_to=asked(reply))


def asked(reply: Message) -> Message:
    """A question that a reply to it goes the way of ``reply``."""
    reply.metadata.__dict__["_message_id"] = reply.metadata.reply_to_message_id
    node = reply.metadata.src_node_id
    reply.metadata.__dict__["_src_node_id"], reply.metadata.__dict__["_dst_node_id"] = 1, node
    return reply


def saying(text: Any) -> Spoil:
    def spoil(reply: Message) -> Message:
        reply.content["fibecfed"] = ConfigRecord({"json": text})
        return reply

    return spoil


def without(record: str) -> Spoil:
    def spoil(reply: Message) -> Message:
        del reply.content[record]
        return reply

    return spoil


def carrying(change: Callable[[bytes], bytes]) -> Spoil:
    def spoil(reply: Message) -> Message:
        data = change(reply.content["adapter"]["adapter"].data)  # type: ignore[call-overload,index,union-attr]
        reply.content["adapter"] = ArrayRecord({"adapter": Array("uint8", (len(data),), "safetensors", data)})
        return reply

    return spoil


def shouted(reply: Message) -> Message:
    return Message(Error(code=3, reason="\x1b[31m" + "A" * 10**6), reply_to=asked(reply))


NONSENSE: dict[str, tuple[Spoil, str]] = {
    "shouted": (shouted, "?[31m" + "A" * 495 + " …"),
    "lost": (lost, "no answer within 0.2 s"),
    "failed": (failed, "<class 'ValueError'>:<'two lines'>"),
    "no values": (without("fibecfed"), "no 'json' in record 'fibecfed', wanted a Trained"),
    "not text": (saying(7), "no 'json' in record 'fibecfed', wanted a Trained"),
    "not JSON": (saying("{"), "Trained: Invalid JSON"),
    "a value missing": (saying('{"loss": 1.0, "samples": 3}'), "Trained.rows: Field required"),
    "a value too many": (saying('{"loss": 1.0, "samples": 3, "rows": 1, "x": 1}'), "Trained.x: Extra inputs"),
    "a loss that is no number": (saying('{"loss": NaN, "samples": 3, "rows": 1}'), "Trained.loss: "),
    "a count below 0": (saying('{"loss": 1.0, "samples": -3, "rows": 1}'), "Trained.samples: "),
    "a count as text": (saying('{"loss": 1.0, "samples": "3", "rows": 1}'), "Trained.samples: "),
    "no adapter": (without("adapter"), "no 'adapter' in record 'adapter', wanted an adapter"),
    "an empty adapter": (carrying(lambda data: b""), "0 bytes"),
    "a damaged adapter": (carrying(lambda data: data[:-1] + bytes([data[-1] ^ 1])), "CRC32C"),
    "half an adapter": (carrying(lambda data: data[: len(data) // 2]), "bytes"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_round_goes_on_without_a_device_that_sends_nonsense(
    name: str, sources: tuple[Path, Path], tmp_path: Path
) -> None:
    spoil, reason = NONSENSE[name]
    record = run(sources, tmp_path, "train", spoil, (2,), "eval.every=2")
    for entry in record.rounds:
        assert list(entry.refused) == [2]
        assert reason in entry.refused[2]
        assert entry.loss is not None
    assert adapter(record)


def test_a_round_without_any_device_is_void(sources: tuple[Path, Path], tmp_path: Path) -> None:
    record = run(sources, tmp_path, "train", lost, (0, 1, 2, 3))
    for entry in record.rounds:
        assert list(entry.refused) == [0, 1, 2, 3]
        assert (entry.loss, entry.samples, entry.bytes_up, entry.rows_active) == (None, 0, 0, 0)
    first, second = record.rounds
    assert first.global_accuracy == second.global_accuracy is not None
    assert record.end is not None
    assert record.end.refused == {}


def test_a_device_that_cannot_be_evaluated_is_left_out_and_said(
    sources: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    whole = run(sources, tmp_path / "whole", "train", lambda reply: reply, ())
    boast = saying('{"tested": 1, "whole": null, "own": 2}')
    silent = saying('{"tested": 1, "whole": 1, "own": null}')
    found = ((lost, "no answer within 0.2 s"), (boast, "more right than tested"), (silent, "an answer is missing"))
    for spoil, reason in found:
        caplog.clear()
        record = run(sources, tmp_path / reason[:2], "evaluate", spoil, (1, 3))
        assert [entry.global_accuracy for entry in record.rounds] == [entry.global_accuracy for entry in whole.rounds]
        assert all(entry.personal_accuracy is not None for entry in record.rounds)
        for device in (1, 3):
            assert caplog.messages.count(f"device {device} is not evaluated: {reason}") == 2


def test_local_layers_that_do_not_arrive_are_left_out_of_the_adapter_and_said(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    record = run(sources, tmp_path, "query.last", failed, (0,))
    assert record.end is not None
    assert record.end.refused == {0: "<class 'ValueError'>:<'two lines'>"}


@pytest.mark.parametrize(
    ("kind", "spoil", "problem"),
    [
        ("query.hello", failed, r"device \d \(node 102\): <class 'ValueError'>:<'two lines'>"),
        ("query.hello", saying('{"partition": "2"}'), r"device \d \(node 102\): Hello.partition: "),
        ("query.hello", saying('{"partition": 1}'), r"partition-id of the nodes: \[0, 1, 1, 3\], wanted each of 0 … 3"),
        ("query.hello", saying('{"partition": null, "train": 3}'), "some nodes have data of their own"),
        ("query.sensitivity", lost, r"device 2 \(node 102\): no answer within 0.2 s"),
        ("query.sensitivity", saying('{"values": [1.0]}'), "device 2: 1 sensitivities, wanted 3, one a block"),
        ("query.sensitivity", saying('{"values": [1, 2, 3, 4]}'), "device 2: 4 sensitivities, wanted 3, one a block"),
        ("query.spectrum", saying("[]"), r"device 2 \(node 102\): Decided: "),
        ("query.score", lost, r"device 2 \(node 102\): no answer within 0.2 s"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_device_that_fails_before_round_1_ends_the_run_by_name(
    kind: str, spoil: Spoil, problem: str, sources: tuple[Path, Path], tmp_path: Path
) -> None:
    every = ["gal.selection=sensitive", "gal.spectrum=true", "gal.lanczos_devices=4", "curriculum.lazy=false"]
    with pytest.raises(FleetError, match=problem):
        run(sources, tmp_path, kind, spoil, (2,), *every)
    assert (tmp_path / "test").exists() == (kind != "query.hello")


def test_nodes_that_are_missing_or_have_nothing_are_refused(sources: tuple[Path, Path], tmp_path: Path) -> None:
    settings = config(sources, tmp_path)
    with pytest.raises(FleetError, match=r"3 nodes after 0.2 s, wanted partition.devices = 4"):
        serve(LocalGrid(flat(settings), parts(0, 1, 2)), settings, timeout=0.2)
    with pytest.raises(FleetError, match=r"partition-id of the nodes: \[0, 1, 2, 3, 4\]"):
        serve(LocalGrid(flat(settings), parts(0, 1, 2, 3, 4)), settings)
    with pytest.raises(FleetError, match=r"node 10\d\): .*ConfigError.*partition-id = '0': wanted a number from 0"):
        serve(LocalGrid(flat(settings), [{"partition-id": "0"}] * 4), settings)
    (tmp_path / "one.csv").write_text("text,label\n" + "w1 w2,a\n" * 9)
    own = [{"data.source": str(tmp_path / "one.csv")}] * 4
    with pytest.raises(FleetError, match="the devices' data has 1 class in all, wanted at least two"):
        serve(LocalGrid(flat(settings), own), settings)

    def empty(node: int, reply: Message) -> Message:
        return saying('{"partition": null, "train": 0, "test": 2, "classes": ["a", "b"]}')(reply) or reply

    with pytest.raises(FleetError, match="node 100 has 0 samples to train and 2 to test on, wanted some"):
        serve(LocalGrid(flat(settings), own, empty), settings)
    assert not (tmp_path / "test").exists()


def test_a_node_that_no_message_reaches_is_not_waited_for(sources: tuple[Path, Path], tmp_path: Path) -> None:
    settings = config(sources, tmp_path)
    grid = LocalGrid(flat(settings), parts(0, 1, 2, 3), unreachable=101)
    with pytest.raises(FleetError, match=r"\(node 101\): no message reached it"):
        serve(grid, settings, timeout=1e6)


def test_a_node_answers_for_its_own_partition_alone(sources: tuple[Path, Path], tmp_path: Path) -> None:
    settings = config(sources, tmp_path)
    grid = LocalGrid(flat(settings), parts(0, 1, 2, 3))
    places = iter((1, 0, 2, 3))

    def swap(node: int, reply: Message) -> Message:
        if reply.metadata.message_type == "query.hello":
            return saying(f'{{"partition": {next(places)}}}')(reply) or reply
        return reply

    grid.spoil = swap
    with pytest.raises(FleetError, match=r"asked as device \d, wanted \d, this node's partition-id"):
        serve(grid, settings)


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ({"train.round": 3}, "run config train.round=3: train.round is no known key; did you mean train.rounds?"),
        ({"train.rounds": "many"}, "train.rounds = 'many': wanted"),
        ({"timeout": 0}, "run config timeout=0: wanted seconds, more than 0"),
        ({"timeout": True}, "run config timeout=true: wanted seconds"),
        ({"timeout": float("nan")}, "run config timeout=nan: wanted seconds"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_by_its_name(
    setting: dict[str, Any], problem: str, sources: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = config(sources, tmp_path)
    with pytest.raises(ConfigError) as caught:
        serve(LocalGrid(flat(settings), parts(0, 1, 2, 3)), settings, **setting)
    assert problem in str(caught.value)

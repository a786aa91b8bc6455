"""Nodes that are missing, do not fit, fail, or send nonsense: who and why is said, and the run goes on where it can."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from fibecfed.config import ConfigError
from fibecfed.flower.fleet import FleetError
from fibecfed.record import RunRecord

from ..small_run import config
from .grid import LocalGrid
from .running import adapter, flat, parts, serve
from .spoiling import Spoil, carrying, changing, failed, lost, saying, shouted, without

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = ["gal.selection=first", "gal.spectrum=false"]


def run(
    sources: tuple[Path, Path], out: Path, kind: str, spoil: Spoil, nodes: tuple[int, ...], *overrides: str
) -> RunRecord:
    """A run in which the answers of some nodes to one kind of question are spoilt."""
    settings = config(sources, out, *QUICK, "train.rounds=2", "train.per_round=4", *overrides)

    def maybe(node: int, reply: Message) -> Message | None:
        return spoil(reply) if node - 100 in nodes and reply.metadata.message_type == kind else reply

    return serve(LocalGrid(flat(settings), parts(0, 1, 2, 3), maybe), settings, timeout=0.2)


def decided(**values: int) -> Spoil:
    found = {"found": True, "share": 0.5, "eigenvalues": [], "weights": [], "lipschitz": 1.0}
    return saying(json.dumps(found | values))


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
    "more samples than it has": (saying('{"loss": 1.0, "samples": 65, "rows": 1}'), "wanted at most "),
    "more rows than there are": (saying('{"loss": 1.0, "samples": 3, "rows": 221}'), "and 221 rows, wanted at most "),
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


def test_a_device_that_cannot_be_evaluated_is_left_out_and_said(sources: tuple[Path, Path], tmp_path: Path) -> None:
    whole = run(sources, tmp_path / "whole", "train", lambda reply: reply, ())
    assert all(entry.unevaluated == {} for entry in whole.rounds)
    found = {
        "late": (lost, "no answer within 0.2 s"),
        "boast": (changing(own=11), "more right than tested"),
        "silent": (changing(own=None), "an answer is missing"),
        "many": (changing(tested=99), "tested on 99 samples, wanted its "),
        "few": (changing(tested=1, own=1), "tested on 1 samples, wanted its "),
    }
    for name, (spoil, reason) in found.items():
        record = run(sources, tmp_path / name, "evaluate", spoil, (1, 3), "partition.scheme=iid")
        assert all(entry.global_accuracy is not None for entry in record.rounds)
        assert all(entry.personal_accuracy is not None for entry in record.rounds)
        for entry in record.rounds:
            assert list(entry.unevaluated) == [1, 3]
            assert all(one.startswith(reason) for one in entry.unevaluated.values())


def test_local_layers_that_do_not_arrive_are_left_out_of_the_adapter_and_said(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    record = run(sources, tmp_path, "query.last", failed, (0,))
    assert record.end is not None
    assert record.end.refused == {0: "<class 'ValueError'>:<'two lines'>"}
    record = run(sources, tmp_path / "forgot", "query.last", changing(trained=False), (0,))
    assert record.end is not None
    assert record.end.refused == {0: "it has nothing left of the rounds that it trained in"}


def test_a_device_that_trained_but_whose_answer_was_lost_is_in_the_adapter_and_one_that_did_not_is_no_loss(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    """The last upload asks everybody who was drawn: only the node knows whether it trained."""
    asked: list[int] = []

    def count(node: int, reply: Message) -> Message | None:
        if reply.metadata.message_type == "query.last":
            asked.append(node)
        return None if (node, reply.metadata.message_type) == (101, "train") else reply

    settings = config(sources, tmp_path, *QUICK, "train.rounds=1", "train.per_round=4")
    grid = LocalGrid(flat(settings), parts(0, 1, 2, 3), count)
    record = serve(grid, settings, timeout=0.2)
    assert list(record.rounds[0].refused) == [1]
    assert record.end is not None
    assert (sorted(asked), record.end.refused) == ([100, 101, 102, 103], {})
    assert record.end.bytes_up - sum(entry.bytes_up for entry in (record.init, *record.rounds) if entry) > 0

    del asked[:]
    settings = config(sources, tmp_path / "unreached", *QUICK, "train.rounds=1", "train.per_round=4")
    grid = LocalGrid(flat(settings), parts(0, 1, 2, 3), count, lambda *asked: asked == (102, "train"))
    record = serve(grid, settings, timeout=0.2)
    assert record.end is not None
    assert list(record.rounds[0].refused) == [1, 2]
    assert (sorted(asked), record.end.refused) == ([100, 101, 102, 103], {})


def test_what_a_refused_device_says_of_its_round_is_not_counted_but_what_it_sent_is(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    whole = run(sources, tmp_path / "whole", "train", lambda reply: reply, (), "train.rounds=1").rounds[0]
    spoil = carrying(lambda data: data[: len(data) // 2])
    found = run(sources, tmp_path / "half", "train", spoil, (2,), "train.rounds=1").rounds[0]
    assert whole.samples is not None
    assert found.samples is not None
    assert found.samples < whole.samples
    assert found.bytes_up == whole.bytes_up - (whole.bytes_up // 4 - whole.bytes_up // 4 // 2)


@pytest.mark.parametrize(
    ("kind", "spoil", "problem"),
    [
        ("query.hello", failed, "3 nodes have answered, wanted .* = 4; node 102: <class 'ValueError'>:<'two lines'>"),
        ("query.hello", saying('{"partition": "2"}'), "node 102: Hello.partition: "),
        ("query.hello", saying('{"partition": 1}'), r"partition-id of the nodes: \[0, 1, 1, 3\], wanted each of 0 … 3"),
        (
            "query.hello",
            saying('{"partition": null, "train": 3, "test": 1, "classes": ["a"]}'),
            "some nodes have data of their own",
        ),
        ("query.sensitivity", lost, r"device 2 \(node 102\): no answer within 0.2 s"),
        ("query.sensitivity", saying('{"values": [1.0]}'), "device 2: 1 sensitivities, wanted 3, one a block"),
        ("query.sensitivity", saying('{"values": [1, 2, 3, 4]}'), "device 2: 4 sensitivities, wanted 3, one a block"),
        ("query.spectrum", saying("[]"), r"device 2 \(node 102\): Decided: "),
        ("query.spectrum", decided(m=9, dim=8), "device 2: m = 9 of dim = 8, of 1602 values"),
        ("query.spectrum", decided(m=9, dim=10**9), "device 2: m = 9 of dim = 1000000000, of 1602 values"),
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

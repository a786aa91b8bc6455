"""Which nodes of a grid become the devices of a run, and what is said of the others."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from fibecfed.flower.nodes import FleetError, gather

from ..small_run import config
from .grid import LocalGrid
from .running import flat, parts, serve
from .spoiling import asked, failed, saying

pytestmark = pytest.mark.usefixtures("one_thread")
OWN = '{{"partition": null, "train": {train}, "test": 2, "classes": ["a", "b"], "pair": {pair}}}'


def saying_of(train: list[int], pair: list[bool] | None = None) -> Any:
    """What nodes with data of their own say, nodes 100, 101, …"""

    def spoil(node: int, reply: Message) -> Message | None:
        text = OWN.format(train=train[node - 100], pair=str((pair or [False] * 9)[node - 100]).lower())
        return saying(text)(reply)

    return spoil


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


def test_nodes_with_a_partition_are_in_its_order_and_those_with_data_of_their_own_in_that_of_their_numbers(
    log: pytest.LogCaptureFixture,
) -> None:
    found = gather(LocalGrid({}, parts(2, 0, 1)), 3, 1.0)
    assert [(node, hello.partition) for node, hello in found.items()] == [(101, 0), (102, 1), (100, 2)]
    assert [message for message in log.messages if message.startswith("device")] == [
        "device 0 is node 101",
        "device 1 is node 102",
        "device 2 is node 100",
    ]
    for pair in (False, True):
        own = gather(LocalGrid({}, parts(2, 0, 1), saying_of([5, 6, 7], [pair] * 3)), 3, 1.0)
        assert [(node, hello.train) for node, hello in own.items()] == [(100, 5), (101, 6), (102, 7)]


def test_of_more_nodes_with_data_of_their_own_the_first_take_part_and_the_others_are_named(
    log: pytest.LogCaptureFixture,
) -> None:
    found = gather(LocalGrid({}, parts(0, 1, 2, 3, 4), saying_of([5, 0, 7, 8, 9])), 3, 1.0)
    assert list(found) == [100, 102, 103]
    assert "node 101 takes no part: 0 samples to train and 2 to test on, wanted some" in log.messages
    assert "node 104 takes no part: there are partition.devices = 3 before it" in log.messages


def test_who_takes_part_does_not_depend_on_who_answers_first() -> None:
    class Late(LocalGrid):
        """Node 100's answer comes at the second look."""

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            asked = sorted(message_ids, key=int)
            return super().pull_messages(asked if len(asked) == 1 and next(self._looks) > 1 else asked[1:])

    assert list(gather(Late({}, parts(0, 1, 2), saying_of([5, 6, 7])), 2, 10.0)) == [100, 101]


def test_a_node_that_is_silent_or_fails_is_left_out_where_there_are_enough_others(
    log: pytest.LogCaptureFixture,
) -> None:
    def spoil(node: int, reply: Message) -> Message | None:
        if node == 101:
            return None
        return failed(reply) if node == 102 else reply

    found = gather(LocalGrid({}, [*parts(0), {}, {}, *parts(0, 1)[1:]], spoil), 2, 0.2)
    assert list(found) == [100, 103]
    assert "node 101 takes no part: no answer within 0.2 s" in log.messages
    assert "node 102 takes no part: <class 'ValueError'>:<'two lines'>" in log.messages


def test_a_node_that_went_away_is_asked_again_when_it_is_back(log: pytest.LogCaptureFixture) -> None:
    """A node keeps its number where it signs its messages."""
    times: dict[int, int] = {}

    def spoil(node: int, reply: Message) -> Message:
        times[node] = times.get(node, 0) + 1
        if node == 100 and times[node] == 1:
            return Message(Error(ErrorCode.NODE_UNAVAILABLE, "offline"), reply_to=asked(reply))
        return reply

    grid = LocalGrid({}, parts(0, 1), spoil, listed=lambda look: [101] if look == 1 else [100, 101])
    assert list(gather(grid, 2, 10.0)) == [100, 101]
    assert times == {100: 2, 101: 1}
    assert not any("takes no part" in message for message in log.messages)


def test_a_node_that_comes_later_is_waited_for_and_one_that_left_after_its_answer_counts() -> None:
    looks: list[int] = []

    def listed(look: int) -> list[int]:
        looks.append(look)
        return [[], [100], [101]][min(look, 2)]

    assert list(gather(LocalGrid({}, parts(0, 1), listed=listed), 2, 10.0)) == [100, 101]
    assert looks == [0, 1, 2]


@pytest.mark.parametrize(
    ("nodes", "spoil", "problem"),
    [
        (parts(0, 1, 2), None, "3 nodes have answered, wanted partition.devices = 4"),
        (parts(0, 1, 2, 3, 4), None, r"partition-id of the nodes: \[0, 1, 2, 3, 4\], wanted each of 0 … 3 once"),
        (parts(0, 1, 1, 3), None, r"partition-id of the nodes: \[0, 1, 1, 3\], wanted each of 0 … 3 once"),
        ([{"partition-id": "0"}] * 4, None, "0 nodes .*; node 100: .*ConfigError.*'0': wanted a number from 0"),
        (parts(0, 1, 2, 3), saying_of([0, 1, 1, 1]), "3 nodes .*; node 100: 0 samples to train and 2 to test on"),
        (
            parts(0, 1, 2, 3),
            saying_of([1] * 4, [False, True, False, True]),
            "nodes 101, 103 have pairs of texts .data.pair., others have not",
        ),
    ],
)
def test_nodes_that_are_too_few_or_do_not_fit_together_are_refused(
    nodes: list[dict[str, Any]], spoil: Any, problem: str
) -> None:
    grid = LocalGrid({}, nodes) if spoil is None else LocalGrid({}, nodes, spoil)
    with pytest.raises(FleetError, match=problem):
        gather(grid, 4, 0.3)


def test_what_cannot_change_is_not_waited_for() -> None:
    start = time.monotonic()
    grid = LocalGrid({}, parts(0, 1, 2, 3), unreachable=lambda node, kind: node == 101)
    with pytest.raises(FleetError, match=r"3 nodes have answered, .*; node 101: no message reached it"):
        gather(grid, 4, 1e6)
    assert time.monotonic() - start < 1e5


def test_devices_with_one_class_in_all_are_refused_before_anything_is_written(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = config(sources, tmp_path)
    (tmp_path / "one.csv").write_text("text,label\n" + "w1 w2,a\n" * 9)
    own = [{"data.source": str(tmp_path / "one.csv")}] * 4
    with pytest.raises(FleetError, match="the devices' data has 1 class in all, wanted at least two"):
        serve(LocalGrid(flat(settings), own), settings)
    assert not (tmp_path / "test").exists()


def test_a_node_answers_for_its_own_partition_alone(sources: tuple[Path, Path], tmp_path: Path) -> None:
    settings = config(sources, tmp_path)
    places = iter((1, 0, 2, 3))

    def swap(node: int, reply: Message) -> Message:
        if reply.metadata.message_type == "query.hello":
            return saying(f'{{"partition": {next(places)}}}')(reply) or reply
        return reply

    with pytest.raises(FleetError, match=r"asked as device \d, wanted \d, this node's partition-id"):
        serve(LocalGrid(flat(settings), parts(0, 1, 2, 3), swap), settings)

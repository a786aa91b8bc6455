"""The nodes of a Flower grid as the devices of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from flwr.serverapp import Grid
from pydantic import BaseModel
from torch import Tensor

from fibecfed_kernels import WirePlan

from ..alike import digests
from ..client import TrainResult
from ..config import RunConfig
from ..data import DataError, merge_classes
from ..evaluation import evaluate_global
from ..federation import build, build_without_data
from ..fleet import Census, LocalFleet, OnPhase
from ..lossless import Decision
from ..server import LocalStore, Server, Upload, weighted_mean
from ..stopwatch import Stopwatch
from .messages import (
    Decided,
    Last,
    Left,
    MessageError,
    Nothing,
    Place,
    Sensitivities,
    Spectrum,
    Test,
    Tested,
    Trained,
    Work,
    decode_adapter,
)
from .nodes import Answer, FleetError, Nodes, gather

OWN_DATA = "nodes"  # what the record says of data.source where every node has data of its own


class FlowerFleet:
    """Nodes of a grid, in the order of their partitions, or of their ids where they have data of their own.

    What a device keeps between its rounds lies on its node. Raises FleetError where nodes are missing, or their data
    does not fit together.

    Attributes: ``config``: the run's, with ``data.source`` "nodes" where every node has data of its own.
    """

    def __init__(self, grid: Grid, config: RunConfig, timeout: float) -> None:
        found = gather(grid, config.partition.devices, timeout)
        self._nodes, self._hellos = Nodes(grid, list(found), timeout), list(found.values())
        own = self._hellos[0].classes is not None
        self.config = _with_source(config, OWN_DATA) if own else config
        self._classes = self._merged() if own else None
        self.fed = build(config) if self._classes is None else build_without_data(self.config, self._classes)
        here = LocalFleet(self.fed)
        self._here = None if own else here  # what could be done here with the run's own data
        self._alike = digests(self.fed, data=not own)
        self.flat, self.client = here.flat, here.client
        self.store: LocalStore
        self._work: dict[str, Any] = {}
        self._drawn: set[int] = set()
        self._trained: set[int] = set()

    def _merged(self) -> list[str]:
        """The classes of all."""
        try:
            return list(merge_classes(hello.classes or () for hello in self._hellos))
        except DataError as error:
            raise FleetError(str(error)) from None

    def _tests(self, device: int) -> int:
        """The number of the device's test samples."""
        return self._hellos[device].test if self._here is None else len(self.fed.devices[device].test)

    @property
    def sizes(self) -> np.ndarray:
        return self.fed.sizes if self._here is not None else np.array([hello.train for hello in self._hellos])

    def samples(self) -> dict[str, int]:
        if self._here is not None:
            return self._here.samples()
        return {name: sum(getattr(hello, name) for hello in self._hellos) for name in ("train", "test")}

    def census(self) -> Census:
        if self._here is not None:
            return self._here.census()
        return Census(None, None, [{"size": int(size), "labels": []} for size in self.sizes])

    def scores(self) -> np.ndarray:
        return np.zeros(0)  # they stay on the nodes

    # -- initialization phase ------------------------------------------------------------------------------------

    def sensitivities(self) -> Iterator[Tensor]:
        places, model = self._about(Place, range(len(self._nodes))), cast(Any, self.flat.model)
        for answer in self._nodes.ask("query.sensitivity", Sensitivities, places):
            values = self._nodes.needed(answer).values
            if len(values) != (blocks := model.config.num_hidden_layers):
                raise FleetError(f"device {answer.device}: {len(values)} sensitivities, wanted {blocks}, one a block")
            yield torch.tensor(values, dtype=torch.float64)

    def decisions(self, asked: Sequence[int], layer: int | None = None) -> Iterator[Decision]:
        for answer in self._nodes.ask("query.spectrum", Decided, self._about(Spectrum, asked, layer=layer)):
            values = self._nodes.needed(answer)
            if problem := values.problem(self.flat.numel):
                raise FleetError(f"device {answer.device}: {problem}")
            yield Decision(**values.model_dump())

    def divide(self, gal: Sequence[int], shares: Mapping[int, float]) -> None:
        self.client.gal = tuple(gal)
        if shares:
            self.client.neuron_share = dict(shares)
        self.store = LocalStore(self.flat, gal, 0)
        self._work = {"gal": list(gal), "shares": dict(shares)}

    def score_all(self) -> Iterator[int]:
        for answer in self._nodes.ask("query.score", Nothing, self._about(Work, range(len(self._nodes)))):
            self._nodes.needed(answer)
            yield int(self.sizes[answer.device])

    # -- tuning phase --------------------------------------------------------------------------------------------

    def train(
        self, drawn: Sequence[int], broadcast: Tensor, t: int, share: float, watch: Stopwatch, on_phase: OnPhase
    ) -> Iterator[Upload]:
        work = self._about(Work, drawn, round=t, share=share)
        answers = self._nodes.ask("train", Trained, work, broadcast)
        self._drawn |= set(drawn)
        for done, device in enumerate(drawn):
            with watch.phase("train"):  # as long as the server waits for it
                answer = next(answers)
            on_phase(f"round {t}", done + 1, len(drawn))
            most = self.config.train.epochs * int(self.sizes[device])
            problem = answer.values.problem(most, self.flat.num_rows) if answer.values else answer.problem
            if answer.values is None or problem:
                yield Upload(device, problem=problem)
            else:
                self._trained.add(device)
                yield self._upload(answer, TrainResult(**answer.values.model_dump()))

    def _upload(self, answer: Answer[Any], result: TrainResult | None = None) -> Upload:
        try:
            return Upload(answer.device, decode_adapter(answer.records), result)
        except MessageError as error:
            return Upload(answer.device, problem=str(error))

    def evaluate(self, server: Server, on_phase: OnPhase) -> dict[str, Any]:
        own, here = self.config.eval.personal, self._here is not None
        found = evaluate_global(self.fed, self.client, server, self.store) if here else {}
        if here and not own:
            return found
        server.put()
        plan = WirePlan(self.flat, server.down.layers, "float32")
        message = plan.pack(self.flat, round=0, num_samples=0)
        asked = self._about(Test, range(len(self._nodes)), whole=not here, own=own)
        right: dict[int, Tested] = {}
        missing: dict[int, str] = {}
        for answer in self._nodes.ask("evaluate", Tested, asked, message):
            device, values = answer.device, answer.values
            on_phase("evaluate", device + 1, len(self._nodes))
            problem = answer.problem if values is None else values.problem(self._tests(device), not here, own)
            if values is None or problem:
                missing[device] = problem
            else:
                right[device] = values
        found["unevaluated"] = missing
        if right and not here:
            tested = sum(one.tested for one in right.values())
            found["global_accuracy"] = sum(one.whole or 0 for one in right.values()) / tested
        if right and own:
            shares = [(one.own or 0) / one.tested for one in right.values()]
            found["personal_accuracy"] = weighted_mean(shares, self.sizes[list(right)])
        return found

    def last_uploads(self, plan: WirePlan) -> Iterator[Upload]:
        """Of the devices that were drawn: also an answer to a round's question that was lost may have trained."""
        for answer in self._nodes.ask("query.last", Left, self._about(Last, sorted(self._drawn), dtype=plan.dtype)):
            if answer.values is None:
                yield Upload(answer.device, problem=answer.problem)
            elif answer.values.trained:
                yield self._upload(answer)
            elif answer.device in self._trained:
                yield Upload(answer.device, problem="it has nothing left of the rounds that it trained in")

    def _about(self, kind: type[Place], devices: Sequence[int], **more: Any) -> dict[int, BaseModel]:
        """The question to each of the devices."""
        work = self._work if issubclass(kind, Work) else {}
        shared = {"classes": self._classes, "alike": self._alike, **work, **more}
        return {device: kind(index=device, **shared) for device in devices}


def _with_source(config: RunConfig, source: str) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"source": source})})

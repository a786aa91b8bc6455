"""The end of a run as one PEFT adapter folder that PeftModel.from_pretrained loads."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from fibecfed_kernels import WirePlan, aggregate

from .fleet import Fleet
from .server import Server


class Exported(NamedTuple):
    """path: the adapter folder. bytes_up: what the devices sent for it."""

    path: Path
    bytes_up: int


def export_adapter(fleet: Fleet, server: Server, path: Path) -> Exported:
    """Save GAL and head from the server with the n_k-weighted mean of the local layers of all devices that ever
    trained.

    The local layers travel once for this, in one final upload by each of those devices, counted in ``bytes_up`` [ours].
    """
    fed = fleet.fed
    server.put()
    fleet.store.reset()
    sizes: list[int] = []
    local = [layer for layer in fed.flat.layers if layer not in set(server.up.layers)]
    if local:
        plan = WirePlan(fed.flat, local, dtype=server.down.dtype)

        def uploads() -> Iterator[Tensor]:
            for size, message in fleet.last_uploads(plan):
                sizes.append(size)
                yield message

        weights = (size for size in sizes)  # each is there when its message is
        first = next(messages := uploads(), None)
        if first is not None:
            mean = aggregate(plan, chain([first], messages), weights, round=0, device=fed.flat.data.device)
            plan.scatter_(mean, fed.flat)
            server.put()  # the head travelled along and is the server's to say
    fed.loaded.model.save_pretrained(str(path))
    fed.loaded.tokenizer.save_pretrained(path)
    return Exported(path, plan.nbytes * len(sizes) if local else 0)

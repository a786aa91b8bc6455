"""The end of a run as one PEFT adapter folder that PeftModel.from_pretrained loads."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from fibecfed_kernels import WirePlan, aggregate

from .federation import Federation
from .server import LocalStore, Server


class Exported(NamedTuple):
    """path: the adapter folder. bytes_up: what the devices sent for it."""

    path: Path
    bytes_up: int


def export_adapter(fed: Federation, server: Server, store: LocalStore, path: Path) -> Exported:
    """Save GAL and head from the server with the n_k-weighted mean of the local layers of all devices that ever
    trained.

    The local layers travel once for this, in one final upload by each of those devices, counted in ``bytes_up`` [ours].
    """
    trained = [device for device in fed.devices if device.rounds > 0]
    bytes_up = 0
    server.put()
    store.reset()
    local = [layer for layer in fed.flat.layers if layer not in set(server.up.layers)]
    if local and trained:
        plan = WirePlan(fed.flat, local, dtype=server.down.dtype)

        def uploads():  # type: ignore[no-untyped-def]
            for device in trained:
                store.load(device.index)
                yield plan.pack(fed.flat, round=0, num_samples=device.size)

        mean = aggregate(plan, uploads(), [device.size for device in trained], round=0, device=fed.flat.data.device)
        plan.scatter_(mean, fed.flat)
        bytes_up = plan.nbytes * len(trained)
        server.put()  # the head travelled along and is the server's to say
    fed.loaded.model.save_pretrained(str(path))
    fed.loaded.tokenizer.save_pretrained(path)
    return Exported(path, bytes_up)

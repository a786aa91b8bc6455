"""The end of a run as one PEFT adapter folder that PeftModel.from_pretrained loads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fibecfed_kernels import WirePlan

from .fleet import Fleet
from .server import Server, Upload, average


class Exported(NamedTuple):
    """path: the adapter folder. bytes_up: what the devices sent for it. refused {device: reason}: who is not in it."""

    path: Path
    bytes_up: int
    refused: dict[int, str]


def export_adapter(fleet: Fleet, server: Server, path: Path) -> Exported:
    """Save GAL and head from the server with the n_k-weighted mean of the local layers of all devices that ever
    trained.

    The local layers travel once for this, in one final upload by each of those devices, counted in ``bytes_up`` [ours].
    """
    fed = fleet.fed
    server.put()
    fleet.store.reset()
    bytes_up, refused = 0, dict[int, str]()

    def counted(uploads: Iterator[Upload]) -> Iterator[Upload]:
        nonlocal bytes_up
        for upload in uploads:
            bytes_up += 0 if upload.message is None else upload.message.numel()
            yield upload

    local = [layer for layer in fed.flat.layers if layer not in set(server.up.layers)]
    if local:
        plan = WirePlan(fed.flat, local, dtype=server.down.dtype)
        uploads = counted(fleet.last_uploads(plan))
        mean, refused = average(plan, uploads, fleet.sizes, round=0, device=fed.flat.data.device)
        if mean is not None:
            plan.scatter_(mean, fed.flat)
            server.put()  # the head travelled along and is the server's to say
    fed.loaded.model.save_pretrained(str(path))
    fed.loaded.tokenizer.save_pretrained(path)
    return Exported(path, bytes_up, refused)

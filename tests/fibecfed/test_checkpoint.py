"""A checkpoint puts back everything it was made of, is written whole or not at all, and knows whose it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fibecfed import checkpoint
from fibecfed.checkpoint import CHECKPOINT_FILE, load_checkpoint, save_checkpoint
from fibecfed.federation import Federation
from fibecfed.record import RecordError

from .federated import federation, halves

ELAPSED = 12.3456789012345


def in_the_middle() -> Federation:
    """Devices 0 and 2 were scored, with other scores; device 1 never was."""
    fed = federation("wire.delta=true", "wire.error_feedback=true")
    for k, rounds in ((0, 3), (2, 1)):
        device = fed.devices[k]
        device.rounds = rounds
        device.scores = np.arange(device.size, dtype=np.float32) + k
        device.importance = torch.full((fed.flat.num_rows,), k + 0.5)
    return fed


def test_everything_comes_back(tmp_path: Path) -> None:
    fed, fresh = in_the_middle(), federation("wire.delta=true", "wire.error_feedback=true")
    server, store = halves(fed)
    store.residuals.normal_()
    assert store.residuals.numel() > 0
    save_checkpoint(tmp_path, 7, ELAPSED, server, store, fed.devices, {})
    new_server, new_store = halves(fresh)
    fresh.devices[1].scores, fresh.devices[1].importance = np.ones(5, dtype=np.float32), torch.ones(3)
    assert load_checkpoint(tmp_path, new_server, new_store, fresh.devices) == (7, ELAPSED)
    assert torch.equal(new_server.values, server.values)
    assert torch.equal(new_store.rows, store.rows)
    assert torch.equal(new_store.residuals, store.residuals)
    for device, before in zip(fresh.devices, fed.devices, strict=True):
        assert device.rounds == before.rounds
        if before.scores is None or before.importance is None:
            assert device.scores is None
            assert device.importance is None
            continue
        assert device.scores is not None
        assert device.importance is not None
        assert device.scores.dtype == np.float32
        assert device.scores.tolist() == before.scores.tolist()
        assert torch.equal(device.importance, before.importance)
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT_FILE]


def test_an_interrupted_write_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fed = in_the_middle()
    server, store = halves(fed)
    save_checkpoint(tmp_path, 1, ELAPSED, server, store, fed.devices, {})

    def interrupted(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half of a")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, ELAPSED, server, store, fed.devices, {})
    assert load_checkpoint(tmp_path, server, store, fed.devices)[0] == 1


@pytest.mark.parametrize("missing", [True, False], ids=["missing", "another-shape"])
@pytest.mark.parametrize("name", ["global", "local", "participations"])
def test_a_checkpoint_of_another_shape_is_refused_and_changes_nothing(tmp_path: Path, name: str, missing: bool) -> None:
    fed = in_the_middle()
    server, store = halves(fed)
    save_checkpoint(tmp_path, 1, ELAPSED, server, store, fed.devices, {})
    with safe_open(tmp_path / CHECKPOINT_FILE, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    if missing:
        del tensors[name]
    else:
        tensors[name] = torch.zeros(4, 1)
    save_file(tensors, tmp_path / CHECKPOINT_FILE, metadata=metadata)
    server, store = halves(fed)
    values, rows = server.values.clone(), store.rows.clone()
    with pytest.raises(RecordError, match=rf"{name} is {'nothing' if missing else r'.4, 1.'}, wanted .*another run"):
        load_checkpoint(tmp_path, server, store, fed.devices)
    assert torch.equal(server.values, values)
    assert torch.equal(store.rows, rows)

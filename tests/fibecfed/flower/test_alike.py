"""Server and nodes have the same base weights, tokenizer and data, or it is said which differ and where."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fibecfed.alike import difference, digests, weights
from fibecfed.batches import Encoded
from fibecfed.federation import Federation, build
from fibecfed.flower.nodes import FleetError
from fibecfed.record import RecordError
from fibecfed.simulation import resume, run

from ..small_run import config
from .grid import LocalGrid
from .running import adapter, flat, parts, serve, without_scores

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = ["gal.selection=first", "gal.spectrum=false", "train.rounds=1"]


def copied(model: Path, folder: Path, change: str = "") -> Path:
    """The checkpoint elsewhere, with one bit of a weight changed, two words of the tokenizer swapped, or one that takes
    capitals for small letters."""
    shutil.copytree(model, folder)
    if change == "bit":
        weights = load_file(folder / "model.safetensors")
        name = next(name for name in weights if name.endswith("attention.self.key.weight"))
        weights[name].view(torch.int32)[0, 0] ^= 1
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    if change in ("swapped", "small"):
        described = json.loads((folder / "tokenizer.json").read_text())
        words = described["model"]["vocab"]
        if change == "small":
            described["normalizer"] = {"type": "Lowercase"}
        else:
            words["w1"], words["w2"] = words["w2"], words["w1"]
        (folder / "tokenizer.json").write_text(json.dumps(described))
    return folder


@pytest.mark.parametrize("owns", [False, True], ids=["parts of the run's data", "data of their own"])
@pytest.mark.parametrize(
    ("change", "what"), [("bit", "base weights"), ("swapped", "tokenizer"), ("small", "tokenizer")]
)
def test_a_node_with_another_model_is_refused_by_what_differs(
    change: str, what: str, owns: bool, sources: tuple[Path, Path], tmp_path: Path
) -> None:
    settings, (model, data) = config(sources, tmp_path / "run", *QUICK, "curriculum.lazy=false"), sources
    nodes = parts(0, 1, 2, 3)
    for node in nodes if owns else ():
        node["data.source"] = str(data)
    nodes[2]["model.source"] = str(copied(model, tmp_path / "other", change))
    with pytest.raises(
        FleetError, match=rf"device 2 \(node 102\): .*other {what} than the server's \(SHA-256 "
    ) as caught:
        serve(LocalGrid(flat(settings), nodes), settings)
    assert ("base weights" in str(caught.value)) == (change == "bit")


def test_a_node_with_other_samples_of_the_runs_data_is_refused(sources: tuple[Path, Path], tmp_path: Path) -> None:
    settings = config(sources, tmp_path, *QUICK, "curriculum.lazy=false")
    nodes = parts(0, 1, 2, 3)
    nodes[1]["data.max_tokens"] = 5
    with pytest.raises(FleetError, match=r"device 1 \(node 101\): .*other data than the server's \(SHA-256 "):
        serve(LocalGrid(flat(settings), nodes), settings)


def test_a_node_whose_model_changes_after_round_1_is_left_out_by_what_differs(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = config(sources, tmp_path / "run", *QUICK, "train.rounds=2", "train.per_round=4")
    nodes = parts(0, 1, 2, 3)
    other = str(copied(sources[0], tmp_path / "other", "bit"))
    grid = LocalGrid(flat(settings), nodes)
    unspoilt = grid.spoil

    def change(node: int, reply: object) -> object:
        if node == 103 and reply.metadata.message_type == "train":  # type: ignore[attr-defined]
            grid.contexts[103].node_config["model.source"] = other
        return unspoilt(node, reply)  # type: ignore[arg-type]

    grid.spoil = change  # type: ignore[assignment]
    first, second = serve(grid, settings).rounds
    assert first.refused == {}
    assert list(second.refused) == [3]
    assert "other base weights than the server's" in second.refused[3]


def test_a_node_may_have_the_model_elsewhere_and_such_a_run_cannot_be_resumed(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    here = run(config(sources, tmp_path / "here", *QUICK))
    settings = config(sources, tmp_path / "grid", *QUICK)
    nodes = parts(0, 1, 2, 3)
    for place, node in enumerate(nodes):
        node["model.source"] = str(copied(sources[0], tmp_path / f"model{place}"))
    there = serve(LocalGrid(flat(settings), nodes), settings)
    assert without_scores(there) == without_scores(here)
    assert adapter(there) == adapter(here)
    record = tmp_path / "grid" / "test" / "record.jsonl"
    record.write_text("".join(record.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(RecordError, match=r"no such file, wanted .* \(one over Flower has none\)"):
        resume(tmp_path / "grid" / "test")


def built(sources: tuple[Path, Path], out: Path, *overrides: str) -> Federation:
    return build(config(sources, out, *overrides))


def test_digests_are_of_what_must_be_alike_and_of_nothing_else(sources: tuple[Path, Path], tmp_path: Path) -> None:
    wanted = digests(built(sources, tmp_path), data=True)
    assert sorted(wanted) == ["base weights", "data", "tokenizer"]
    trained = built(sources, tmp_path)
    trained.flat.data.detach().add_(1.0)
    encode = trained.loaded.tokenizer
    encode(["w1", "w1 w2 w3"], padding=True, truncation=True, max_length=4)  # leaves its settings in the tokenizer
    assert digests(trained, data=True) == wanted
    assert difference(wanted, wanted, "mine") == ""
    for override in ("seed=1", "partition.scheme=iid", "data.max_train=100", "data.max_test=20"):
        other = digests(built(sources, tmp_path, override), data=True)
        assert {what for what in wanted if wanted[what] != other[what]} == {"data"}, override
    assert "data" not in digests(trained, data=False)
    assert difference({"data": "0" * 64}, {}, "mine") == "other data than mine (SHA-256 none …, wanted 000000000000 …)"


def test_weights_of_other_names_or_shapes_are_others_where_their_bytes_are_the_same() -> None:
    def frozen(**sizes: tuple[int, int]) -> nn.ModuleDict:
        """Linear modules without a value that differs."""
        made = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
        for parameter in made.parameters():
            nn.init.zeros_(parameter.requires_grad_(False))
        return made

    found = [weights(frozen(**sizes)) for sizes in ({"a": (2, 3)}, {"a": (2, 3)}, {"a": (3, 2)}, {"b": (2, 3)})]
    assert found[0] == found[1]
    assert len(set(found)) == 3
    assert weights(frozen(a=(2, 3)).bfloat16()) != weights(frozen(a=(1, 3)))


def test_the_datas_digest_is_of_every_token_label_class_and_of_who_has_which(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    fed = built(sources, tmp_path)
    changed: list[Federation] = []
    for side in ("train", "test"):
        split: Encoded = getattr(fed, side)
        for field in ("tokens", "types", "offsets", "labels"):
            values = getattr(split, field).copy()
            values[1] += 1
            changed.append(replace(fed, **{side: replace(split, **{field: values})}))
        changed.append(replace(fed, **{side: replace(split, types=None)}))
        own = [replace(device) for device in fed.devices]
        setattr(own[1], side, getattr(own[1], side)[::-1])
        changed.append(replace(fed, devices=own))
    changed.append(replace(fed, task=replace(fed.task, classes=fed.task.classes[::-1])))
    changed.append(replace(fed, devices=[*fed.devices[:2], *fed.devices[:1:-1]]))
    found = [digests(one, data=True) for one in (fed, *changed)]
    assert len({one["data"] for one in found}) == len(found)
    assert len({one["tokenizer"] + one["base weights"] for one in found}) == 1

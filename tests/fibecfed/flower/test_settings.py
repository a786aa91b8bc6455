"""A configuration out of Flower's flat values, with a node's own data and device."""

from __future__ import annotations

from fibecfed.config import load_config
from fibecfed.flower.settings import DEFAULT_TIMEOUT, run_config, timeout


def test_flat_values_are_a_configuration() -> None:
    values = {
        "train.rounds": 7,
        "train.lr": 2e-3,
        "autocast": True,
        "curriculum.enabled": False,
        "train.betas": "[0.8, 0.9]",
        "model.targets": '["query"]',
        "gal.fraction": "none",
        "data.label": "2024",
        "timeout": 30,
    }
    wanted = ["train.rounds=7", "train.lr=0.002", "autocast=true", "curriculum.enabled=false", "train.betas=[0.8, 0.9]"]
    wanted += ['model.targets=["query"]', "gal.fraction=none", "data.label=2024"]
    assert run_config(values) == load_config(None, wanted)
    assert run_config({}) == load_config()
    assert (timeout(values), timeout({})) == (30.0, DEFAULT_TIMEOUT)


def test_a_node_says_where_its_data_is_and_what_it_computes_on_and_nothing_else() -> None:
    run = {"data.source": "all.csv", "data.text": "words", "train.rounds": 7}
    node = {"data.source": "mine.csv", "data.label": "kind", "device": "cpu", "partition-id": 3, "train.rounds": 99}
    wanted = ["data.source=mine.csv", "data.text=words", "data.label=kind", "device=cpu", "train.rounds=7"]
    assert run_config(run, node) == load_config(None, wanted)

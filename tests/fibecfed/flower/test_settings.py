"""A configuration out of Flower's flat values, with a node's own data and device."""

from __future__ import annotations

import re
import tomllib

import pytest
from flwr.clientapp import ClientApp
from flwr.common.config import flatten_dict, validate_config
from flwr.serverapp import ServerApp
from flwr.supercore.object_ref import load_app

from benchmarks.readme import ROOT
from fibecfed.config import ConfigError, load_config
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


def test_a_node_says_where_its_data_is_and_what_it_computes_on() -> None:
    run = {"data.source": "all.csv", "data.text": "words", "train.rounds": 7}
    node = {"data.source": "mine.csv", "data.label": "kind", "device": "cpu", "partition-id": 3, "name": "Bern"}
    wanted = ["data.source=mine.csv", "data.text=words", "data.label=kind", "device=cpu", "train.rounds=7"]
    assert run_config(run, node) == load_config(None, wanted)


@pytest.mark.parametrize("key", ["train.rounds", "seed", "model.targets", "autocast", "data"])
def test_a_setting_of_the_whole_run_is_refused_on_a_node(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"node config {re.escape(key)}=7: a setting of the whole run"):
        run_config({"data.source": "all.csv"}, {"data.source": "mine.csv", key: 7})


def test_the_readmes_app_is_one() -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    app = tomllib.loads(text)
    good, errors, _ = validate_config(app, check_module=True, project_dir=ROOT)
    assert good, errors
    described = app["tool"]["flwr"]["app"]
    values = flatten_dict(described["config"])
    assert timeout(values) == 3600
    assert run_config(values).partition.devices == 2
    for name, kind in (("serverapp", ServerApp), ("clientapp", ClientApp)):
        assert isinstance(load_app(described["components"][name], ValueError, ROOT), kind)

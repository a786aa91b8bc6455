"""Defaults that give way (a count of layers, the demo's size, the learning rate's decay), names, frozen settings."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from fibecfed.config import RunConfig, dump_config, load_config


def test_a_count_of_layers_is_meant_instead_of_the_default_fraction(tmp_path: Path) -> None:
    config = load_config(None, ["gal.count=2"])
    assert (config.gal.count, config.gal.fraction) == (2, None)
    (tmp_path / "job.toml").write_text(dump_config(config))
    assert load_config(tmp_path / "job.toml") == config
    by_rule = load_config(None, ["gal.fraction=none"])
    assert (by_rule.gal.count, by_rule.gal.fraction) == (None, None)


def test_only_the_demo_is_cut_to_size_and_only_unless_said_otherwise(tmp_path: Path) -> None:
    assert (RunConfig().data.max_train, RunConfig().data.max_test) == (3200, 400)
    assert load_config(None, ["data.source=a.csv"]).data.max_train is None
    whole = load_config(None, ["data.max_train=none", "data.max_test=none"])
    assert (whole.data.max_train, whole.data.max_test) == (None, None)
    (tmp_path / "job.toml").write_text(dump_config(whole))
    assert load_config(tmp_path / "job.toml") == whole


def test_a_configuration_is_frozen() -> None:
    for section, key in ((RunConfig(), "seed"), (RunConfig().train, "rounds")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 3)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ((), "demo"),
        (("name=trial-1.b",), "trial-1.b"),
        (("data.source=/data/my reviews.csv",), "my-reviews-demo"),
        (("data.source=hub:glue/sst2", "model.source=models/smollm2.gguf"), "sst2-smollm2"),
        (("data.source=...", "model.source=/"), "run"),
    ],
)
def test_a_run_is_named_after_data_and_model(overrides: tuple[str, ...], name: str) -> None:
    assert load_config(None, overrides).run_name == name

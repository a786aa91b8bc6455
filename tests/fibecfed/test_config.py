"""Configurations: defaults, TOML there and back, overrides, and errors that name the key in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fibecfed.config import ConfigError, RunConfig, describe_config, dump_config, load_config
from fibecfed.sections import Section

KEYS = [
    f"{name}.{key}" if isinstance(section, Section) else name
    for name, section in RunConfig()
    for key in (type(section).model_fields if isinstance(section, Section) else [name])
]
CHANGED = (
    "name=trial",
    "seed=7",
    "data.source=reviews.csv",
    "data.key=film",
    "data.max_train=500",
    'model.targets=["q_proj", "v_proj"]',
    "partition.size_alpha=none",
    "train.betas=[0.8, 0.95]",
    "train.max_grad_norm=1.5",
    "gal.fraction=none",
    "gal.norm=inf",
    "wire.dtype=int8",
)


def value_of(config: RunConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def error_of(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_no_file_and_no_override_is_the_demo_job() -> None:
    config = load_config()
    assert config == RunConfig()
    assert (config.data.source, config.model.source) == ("demo", "demo")
    assert (config.partition.devices, config.train.rounds, config.train.per_round) == (20, 14, 5)


@pytest.mark.parametrize("overrides", [(), CHANGED], ids=["defaults", "changed"])
@pytest.mark.parametrize("write", [dump_config, describe_config])
def test_written_toml_reads_back_to_an_equal_configuration(
    tmp_path: Path, overrides: tuple[str, ...], write: Any
) -> None:
    config = load_config(None, overrides)
    (tmp_path / "job.toml").write_text(write(config), encoding="utf-8")
    assert load_config(tmp_path / "job.toml") == config


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "train": st.fixed_dictionaries(
                {},
                optional={
                    "lr": st.floats(1e-12, 1e12, exclude_min=True),
                    "max_grad_norm": st.none() | st.floats(1e-6, 10.0),
                    "shuffle": st.booleans(),
                },
            ),
            "data": st.fixed_dictionaries({"source": words}, optional={"label": words}),
            "partition": st.fixed_dictionaries({"size_alpha": st.none() | st.floats(0.01, 100.0)}),
            "seed": st.integers(0, 2**63 - 1),
        },
    )
)
def test_any_valid_configuration_survives_toml(tmp_path_factory: pytest.TempPathFactory, table: dict[str, Any]) -> None:
    config = RunConfig.model_validate(table)
    path = tmp_path_factory.mktemp("toml") / "job.toml"
    for write in (dump_config, describe_config):
        path.write_text(write(config), encoding="utf-8")
        assert load_config(path) == config


def test_unset_keys_are_left_out_of_the_dump_and_shown_as_comments_in_the_description() -> None:
    assert "count" not in dump_config(RunConfig())
    assert "\n# count =" in describe_config(RunConfig())


def test_every_key_is_described() -> None:
    description = describe_config(RunConfig())
    for key in KEYS:
        section, _, leaf = key.rpartition(".")
        fields = type(value_of(RunConfig(), section)).model_fields if section else RunConfig.model_fields
        meaning = fields[leaf].description
        assert meaning, key
        assert meaning[:40] in description, key


def test_lines_of_a_description_fit_a_screen() -> None:
    assert max(map(len, describe_config(load_config(None, CHANGED)).splitlines())) <= 120


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.lr=1e-3", "train.lr", 1e-3),
        ("train.lr=1", "train.lr", 1.0),
        ("train.rounds = 3", "train.rounds", 3),
        ("train.betas=[0.5, 0.9]", "train.betas", (0.5, 0.9)),
        ("train.optimizer=sgd", "train.optimizer", "sgd"),
        ('train.optimizer="sgd"', "train.optimizer", "sgd"),
        ('model.targets=["query"]', "model.targets", ["query"]),
        ("data.source=a=b.csv", "data.source", "a=b.csv"),
        ("data.source=C:\\new\\data.csv", "data.source", "C:\\new\\data.csv"),
        ("data.label=2024", "data.label", "2024"),
        ("data.text=two words", "data.text", "two words"),
        ("data.text=1\nseed=3", "data.text", "1\nseed=3"),
        ("partition.size_alpha=none", "partition.size_alpha", None),
        ("gal.fraction=none", "gal.fraction", None),
        ("gal.norm=inf", "gal.norm", "inf"),
        ("curriculum.pacing=none", "curriculum.pacing", "none"),
        ("curriculum.start=1", "curriculum.start", 1.0),
        ("curriculum.end=0", "curriculum.end", 0.0),
    ],
)
def test_an_override_sets_its_key_and_no_other(override: str, key: str, value: Any) -> None:
    config = load_config(None, [override])
    assert value_of(config, key) == value
    assert type(value_of(config, key)) is type(value)
    follow = ("data.max_train", "data.max_test") if key == "data.source" else ()  # the demo alone is cut to size
    others = [other for other in KEYS if other != key and other not in follow]
    assert [value_of(config, other) for other in others] == [value_of(RunConfig(), other) for other in others]


def test_overrides_win_over_the_file_and_later_ones_over_earlier_ones(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text("seed = 1\n[train]\nrounds = 4\nlr = 0.5\n")
    config = load_config(tmp_path / "job.toml", ["train.rounds=5", "train.rounds=6", "model.rank=2"])
    assert (config.seed, config.train.rounds, config.train.lr, config.model.rank) == (1, 6, 0.5, 2)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("train.lrr=1", "train.lr"),
        ("trian.lr=1", "train.lr"),
        ("lr=1", "train.lr"),
        ("curriculum.pace=sqrt", "curriculum.pacing"),
        ("lanczos_steps=4", "gal.lanczos_steps"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(override: str, nearest: str) -> None:
    key = override.partition("=")[0]
    assert error_of(override) == f"--set {override}: {key} is no known key; did you mean {nearest}?"


def test_an_unknown_key_like_no_other_is_named_alone() -> None:
    assert error_of("zzz=1") == "--set zzz=1: zzz is no known key"
    wanted = "--set eval.foo=1: eval.foo is no known key; eval has every, personal, batch_size"
    assert error_of("eval.foo=1") == wanted


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("seed=true", "integer"),
        ("seed=-1", "0"),
        ('train.rounds="12"', "integer"),
        ("train.rounds=1.5", "integer"),
        ("train.rounds=1\nseed=3", "integer"),
        ("train.rounds=0", "1"),
        ("train.lr=fast", "number"),
        ("train.lr=0", "greater than 0"),
        ("train.lr=nan", "finite"),
        ("train.lr=inf", "finite"),
        ("train.shuffle=1", "boolean"),
        ("train.betas=[0.9]", "one more value"),
        ("train.betas=[0.9, 0.9, 0.9]", "at most 2"),
        ("train.betas=[0.9, 1.0]", "less than 1"),
        ("train.optimizer=adam", "'adamw' or 'sgd'"),
        ("train=3", "section"),
        ("train.lr.x=3", "number"),
        ("model.targets=query", "list"),
        ("model.targets=[]", "at least 1"),
        ("curriculum.start=0.0", "greater than 0"),
        ("curriculum.end=1.1", "less than or equal to 1"),
        ("gal.norm=3", "'2' or 'inf'"),
        ("name=a/b", "letters"),
        ("name=..", "letters"),
        ("out=", "a text that is not empty"),
        ("device=gpu", '"cuda"'),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_one_line_that_names_key_value_and_what_was_wanted(
    override: str, wanted: str
) -> None:
    message = error_of(override)
    key, _, text = override.partition("=")
    if text.startswith("["):
        assert f"{key} = {text}: wanted" in message  # the whole list, not the element that is wrong
    assert f"{key.removesuffix('.x')} = " in message.rpartition(": wanted")[0]
    assert wanted in message.partition("wanted")[2]
    assert "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("gal.count=2", "gal.fraction=0.5"), ("gal", "count", "fraction")),
        (("partition.devices=3",), ("train.per_round", "partition.devices")),
        (("partition.scheme=key", "data.source=a.csv"), ("partition.scheme", "data.key")),
    ],
)
def test_settings_that_exclude_one_another_are_both_named(overrides: tuple[str, ...], named: tuple[str, ...]) -> None:
    message = error_of(*overrides)
    assert all(word in message for word in named)
    assert "\n" not in message


def test_each_of_two_settings_that_exclude_one_another_is_fine_alone() -> None:
    # the demo knows by itself whose sample it is
    for override in ("gal.count=2", "gal.fraction=0.25", "partition.scheme=key", "partition.devices=5"):
        assert load_config(None, [override]) != RunConfig()


def test_a_norm_may_be_written_as_a_number_in_the_file(tmp_path: Path) -> None:
    for text, norm in (("2", "2"), ("2.0", "2"), ("inf", "inf"), ('"inf"', "inf")):
        (tmp_path / "job.toml").write_text(f"[gal]\nnorm = {text}\n")
        assert load_config(tmp_path / "job.toml").gal.norm == norm


def test_an_override_of_no_key_or_no_value_is_refused() -> None:
    for override in ("train.lr", "=3", "train..lr=3", ".lr=3", "train.=3"):
        assert error_of(override) == f"--set {override}: wanted section.key=value"


def test_an_error_of_the_file_names_the_file_and_one_of_an_override_does_not(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text("[train]\nlr = -1\nrounds = 0\n")
    assert error_of(path=path) == f"{path}: train.rounds = 0: wanted greater than or equal to 1 (and 1 more)"
    path.write_text("[train]\nlr = 1\n")
    assert error_of("model.rank=0", path=path).startswith("--set model.rank=0: ")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "no such file"),
        (b"[train\nlr = 1", "is not TOML"),
        (b"lr = ", "is not TOML"),
        (b"name = '\xff'", "is not TOML"),
        (b"seed = 1\nseed = 2", "is not TOML"),
        (b"train = 1", "wanted a section"),
        (b"[trian]\nlr = 1", "trian is no known key; did you mean train?"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_in_one_line(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = tmp_path / "job.toml"
    if content is not None:
        path.write_bytes(content)
    message = error_of(path=path)
    assert message.startswith(f"{path}: ")
    assert problem in message
    assert "\n" not in message


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text("seed = 3", encoding="utf-8-sig")
    assert load_config(path).seed == 3


def test_a_folder_in_place_of_the_file_is_named(tmp_path: Path) -> None:
    assert error_of(path=tmp_path).startswith(f"{tmp_path}: cannot be read")

"""The command line: help, settings, one-line errors, interruptions, reports of hand-made runs."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import typer
from typer.testing import CliRunner

from fibecfed.cli import USER_ERRORS, _user_errors, app, main
from fibecfed.config import RunConfig, load_config
from fibecfed.record import Observer

from .handmade import run_record, write_run


def call(*arguments: str | Path, width: int = 100) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    result = CliRunner(env={"COLUMNS": str(width), "TERM": "dumb"}).invoke(
        app, [str(argument) for argument in arguments]
    )
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ((), ("run", "resume", "score", "report", "doctor")),
        (("run",), ("CONFIG.toml", "--set", "--name", "--data", "--model", "--device", "--print-config", "the demo")),
        (("resume",), ("RUN_DIR", "last finished round")),
        (("score",), ("SCORES", ".parquet", ".csv", "--config", "--set", "--data", "--model", "--show")),
        (("report",), ("RUN_DIR", "--target", "--out", "--no-plots", "config.toml")),
        (("doctor",), ("body of every op",)),
    ],
)
def test_every_command_explains_its_arguments(command: tuple[str, ...], words: tuple[str, ...]) -> None:
    code, out, _ = call(*command, "--help", width=120)
    assert code == 0
    assert [word for word in words if word not in out] == []


def test_the_printed_configuration_is_a_file_that_gives_the_same_one(tmp_path: Path) -> None:
    code, out, _ = call(
        "run", "--print-config", "--set", "gal.count=2", "--data", "a.csv", "--device", "cpu", "--name", "x"
    )
    assert code == 0
    path = tmp_path / "job.toml"
    path.write_text(out)
    expected = ["gal.count=2", "data.source=a.csv", "device=cpu", "name=x"]
    assert load_config(path) == load_config(None, expected)
    assert call("run", path, "--print-config")[1] == out


def test_the_printed_default_is_the_demo(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(call("run", "--print-config")[1])
    assert load_config(path) == RunConfig()


def test_options_win_over_set_and_set_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text('seed = 1\n[model]\nsource = "in-file"\nrank = 3\n')
    out = call("run", path, "--set", "model.source=set", "--set", "seed=2", "--model", "option", "--print-config")[1]
    path.write_text(out)
    config = load_config(path)
    assert (config.seed, config.model.source, config.model.rank) == (2, "option", 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--set", "train.lrr=1"), "--set train.lrr=1: train.lrr is no known key; did you mean train.lr?"),
        (("run", "--set", "train.lr=-1"), "--set train.lr=-1: train.lr = -1: wanted greater than 0"),
        (("run", "--set", "train.lr"), "--set train.lr: wanted section.key=value"),
        (("run", "--name", "a/b"), "--set name=a/b: name = 'a/b': wanted letters"),
        (("run", "--set", "out=good/config.toml"), "config.toml is a file, wanted a folder for the runs"),
        (("run", "--set", "out=good/config.toml/x"), "config.toml is a file, wanted a folder for the runs"),
        (("run", "missing.toml"), "missing.toml: no such file"),
        (("run", "broken.toml"), "broken.toml: is not TOML"),
        (("score", "scores.txt"), "scores.txt: wanted a file that ends in .parquet or .csv"),
        (("score", "folder.csv"), "folder.csv: a folder, wanted a file"),
        (("score", "missing/scores.csv"), "missing/scores.csv: no such folder as missing"),
        (("score", "scores.csv", "--set", "seed=x"), "--set seed=x: seed = 'x': wanted a valid integer"),
        (("resume", "missing"), "missing: no such folder, wanted the folder of a run"),
        (("resume", "good"), "good: this run has ended, there is nothing to resume"),
        (("report", "missing"), "missing: no such folder, wanted the folder of a run"),
        (("report", "broken.toml"), "broken.toml: is a file, wanted the folder of a run"),
        (("report", "."), "config.toml: no such file, wanted the folder of a run"),
        (("report", "good", "missing"), "missing: no such folder"),
        (("report", "good", "--out", "missing"), "No such file or directory"),
    ],
)
def test_a_users_mistake_is_one_line_on_stderr_exit_code_2_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.toml").write_text("[train\n")
    (tmp_path / "folder.csv").mkdir()
    write_run(tmp_path / "good", run_record((0.6,)))
    before = sorted(tmp_path.rglob("*"))
    code, _, err = call(*arguments)
    assert code == 2
    assert err.startswith("fibecfed: ")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rnu",), "fibecfed: No such command 'rnu'."),
        (("run", "--foo"), "fibecfed: No such option '--foo'."),
        (("report",), "fibecfed: Missing argument 'RUN_DIR...'."),
        (("report", ".", "--target", "nan"), "fibecfed: Invalid value for '--target': nan is not a number"),
        (("score", "x.csv", "--show", "-1"), "fibecfed: Invalid value for '--show'"),
    ],
)
def test_a_mistake_in_the_command_itself_is_one_line_that_names_the_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["fibecfed", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert err.startswith(message)
    assert err.endswith(" --help`)\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("arguments", "code"), [((), 2), (("--help",), 0), (("report", "missing"), 2)])
def test_the_entry_point_exits_with_the_commands_own_code(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int
) -> None:
    monkeypatch.setattr(sys, "argv", ["fibecfed", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert (caught.value.code or 0) == code


@pytest.mark.parametrize(("module", "name"), USER_ERRORS)
def test_every_error_of_a_user_is_a_value_error_and_ends_in_one_line(
    module: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = getattr(importlib.import_module(module), name)
    assert issubclass(kind, ValueError)

    class Refusal(kind):  # type: ignore[misc, valid-type]
        def __init__(self) -> None: ...

        def __str__(self) -> str:
            return "column 'x':\n missing"

    with pytest.raises(typer.Exit) as caught, _user_errors():
        raise Refusal
    assert caught.value.exit_code == 2
    assert capsys.readouterr().err == "fibecfed: column 'x': missing\n"


@pytest.mark.parametrize("error", [ValueError("a mistake of ours"), OSError("no file named"), RuntimeError("broken")])
def test_a_mistake_of_ours_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, _user_errors():
        raise error
    assert caught.value is error


def test_a_missing_file_and_a_diverged_loss_are_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (
        FileNotFoundError(2, "No such file or directory", "data.csv"),
        FloatingPointError("round 3: loss nan"),
    ):
        with pytest.raises(typer.Exit) as caught, _user_errors():
            raise error
        assert caught.value.exit_code == 2
    assert capsys.readouterr().err == "fibecfed: data.csv: No such file or directory\nfibecfed: round 3: loss nan\n"


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An empty fibecfed.simulation, for what the command line makes of a run whatever happens in it."""
    module = ModuleType("fibecfed.simulation")
    monkeypatch.setitem(sys.modules, "fibecfed.simulation", module)
    return module


@pytest.mark.parametrize(
    ("stage", "kept"),
    [
        (0, "nothing was written"),
        (1, "runs/demo keeps 0 of 14 rounds"),
        (2, "runs/demo keeps 0 of 14 rounds, `fibecfed resume runs/demo` goes on"),
        (3, "runs/demo keeps 1 of 14 rounds, `fibecfed resume runs/demo` goes on"),
    ],
)
def test_an_interrupted_run_exits_with_130_and_says_what_is_kept(simulation: ModuleType, stage: int, kept: str) -> None:
    record = run_record((0.6,))
    assert record.init is not None

    def interrupted(config: RunConfig, *, observer: Observer) -> None:
        steps = (
            lambda: observer.on_start(config, config.train.rounds, {"path": "runs/demo"}),
            lambda: observer.on_init(record.init),  # type: ignore[arg-type]
            lambda: observer.on_round(record.rounds[0]),
        )
        for step in steps[:stage]:
            step()
        raise KeyboardInterrupt

    simulation.run = interrupted  # type: ignore[attr-defined]
    code, _, err = call("run")
    assert (code, err) == (130, f"interrupted: {kept}\n")


@pytest.mark.parametrize("command", [("run", "--set", "seed=7"), ("resume", "runs/demo")])
def test_a_run_prints_its_rounds_its_summary_and_its_folder(
    simulation: ModuleType, command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    write_run(Path("runs/demo"), run_record((0.6,), end=False))
    record = replace(run_record((0.6, 0.8), "seed=7"), path=Path("runs/demo"))

    def done(what: RunConfig | Path, *, observer: Observer) -> object:
        assert what == (load_config(None, ["seed=7"]) if command[0] == "run" else Path("runs/demo"))
        observer.on_round(record.rounds[0])
        return record

    setattr(simulation, command[0], done)
    code, out, err = call(*command)
    assert (code, err) == (0, "")
    assert "loss 0.7000" in out
    assert "80.0 %, best 80.0 %, majority class 58.0 %" in out
    assert out.endswith("runs/demo: record, plots and adapter\n")


def test_a_report_shows_tables_and_writes_plots_into_the_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "trial", run_record((0.6, 0.8)))
    code, out, err = call("report", folder)
    assert (code, err) == (0, "")
    assert "80.0 %, best 80.0 %" in out
    assert {path.name for path in folder.glob("*.png")} == {"accuracy.png", "sensitivity.png", "scores.png"}


def test_a_report_without_plots_writes_nothing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "trial", run_record((0.6, 0.8)))
    assert call("report", folder, "--no-plots")[0] == 0
    assert list(folder.glob("*.png")) == []


def test_a_report_of_an_interrupted_run_says_what_is_missing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "trial", run_record((0.6, 0.8), end=False))
    path = folder / "record.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    code, out, _ = call("report", folder, "--no-plots", width=300)
    assert code == 0
    assert f"note: {path} line 3 is cut off or damaged and was left out" in out
    assert "interrupted after 1 of 2 rounds" in out


def test_a_report_of_several_runs_compares_them_at_the_target_asked_for(tmp_path: Path) -> None:
    fast = write_run(tmp_path / "fast", run_record((0.7, 0.8)))
    slow = write_run(tmp_path / "slow", run_record((0.6, 0.7), "seed=7"))
    code, out, _ = call("report", fast, slow, "--target", "0.75", "--out", tmp_path)
    assert code == 0
    assert "to 75.0 % global accuracy" in out
    assert "never" in out
    assert "seed" in out
    assert (tmp_path / "compare.png").is_file()
    assert list(fast.glob("*.png")) == []

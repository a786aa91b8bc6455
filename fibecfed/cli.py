"""The command line: run, resume, score, report, doctor. What a user can put right is one line, exit code 2."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import click
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from .config import RunConfig, describe_config, load_config
from .record import Observer, RunRecord, check_out, read_record

app = typer.Typer(
    name="fibecfed",
    no_args_is_help=True,
    add_completion=False,
    suggest_commands=False,  # click does
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fisher-ordered curriculum federated fine-tuning of language models with LoRA.",
)

# What a user can put right. An error can only be of a class whose module is loaded, so none is imported for its sake.
USER_ERRORS = (
    ("fibecfed.config", "ConfigError"),
    ("fibecfed.record", "RecordError"),
    ("fibecfed.data", "DataError"),
    ("fibecfed.partition", "PartitionError"),
    ("fibecfed.models", "ModelError"),
    ("fibecfed.lora", "UnsupportedModuleError"),
    ("fibecfed_kernels.wire", "WireError"),
)

# Arguments are explained in the commands' docstrings: click 8.5 drops the help that typer 0.20 gives to an argument.
Job = Annotated[Path | None, typer.Argument(metavar="[CONFIG.toml]", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="SECTION.KEY=VALUE", help="Change one setting; may be given often.", show_default=False
    ),
]
DataSource = Annotated[
    str | None, typer.Option("--data", help='Short for data.source: "demo", a file or "hub:NAME".', show_default=False)
]
ModelSource = Annotated[
    str | None,
    typer.Option("--model", help='Short for model.source: "demo", a folder or "hub:NAME".', show_default=False),
]
DeviceName = Annotated[
    str | None, typer.Option("--device", help="Short for device: auto, cpu, cuda, …", show_default=False)
]


@app.command()
def run(
    job: Job = None,
    settings: Settings = None,
    name: Annotated[str | None, typer.Option(help="Folder of the run inside `out`.", show_default=False)] = None,
    data: DataSource = None,
    model: ModelSource = None,
    device: DeviceName = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print every setting and stop.")] = False,
) -> None:
    """Fine-tune a model over simulated devices; write record, adapter and plots to a folder of their own.

    CONFIG.toml is the job; without it, this is the demo: film reviews, a small BERT, 20 devices, 14 rounds.
    `fibecfed run --print-config` shows every setting with its meaning, in the form of a file to start from.
    """
    with _user_errors():
        config = _config(job, settings, {"name": name, "data.source": data, "model.source": model, "device": device})
        if print_config:
            typer.echo(describe_config(config), nl=False)
            return
        check_out(config.out)  # here too, since torch and transformers take seconds to import
        from .simulation import run as simulate

        _follow(lambda observer: simulate(config, observer=observer))


@app.command()
def resume(folder: Annotated[Path, typer.Argument(metavar="RUN_DIR")]) -> None:
    """Go on with an interrupted run after its last finished round.

    RUN_DIR is its folder. The result is what the run would have given without the interruption, times aside.
    """
    with _user_errors():
        read_record(folder)  # here too, since torch and transformers take seconds to import
        from .simulation import resume as simulate

        _follow(lambda observer: simulate(folder, observer=observer))


@app.command()
def score(
    output: Annotated[Path, typer.Argument(metavar="SCORES")],
    job: Annotated[
        Path | None,
        typer.Option("--config", metavar="CONFIG.toml", help="A job; its data and model.", show_default=False),
    ] = None,
    settings: Settings = None,
    data: DataSource = None,
    model: ModelSource = None,
    device: DeviceName = None,
    show: Annotated[int, typer.Option(min=0, help="How many of the easiest and of the hardest samples to show.")] = 5,
) -> None:
    """Score how hard each training sample is for a model, by its Fisher information before any training.

    SCORES is the file to write, .parquet or .csv, with the columns index (the sample's row in the data, from 0), text,
    pair (where there is one), label, score and rank (0: the easiest). Samples held out for testing are not scored.
    """
    with _user_errors():
        from .scores import check_format, score_data, write_scores

        check_format(output)
        config = _config(job, settings, {"data.source": data, "model.source": model, "device": device})
        console = Console()
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("score", total=None)
            columns = score_data(config, lambda done, total: progress.update(task, completed=done, total=total))
        write_scores(output, columns)
        console.print(
            f"{output}: {len(columns['score'])} training samples", markup=False, highlight=False, soft_wrap=True
        )
        by_rank = sorted(range(len(columns["rank"])), key=columns["rank"].__getitem__)
        for title, chosen in (("easiest", by_rank[:show]), ("hardest", by_rank[::-1][:show])):
            if chosen:
                console.print(_samples_table(title, columns, chosen))


def _number(value: float | None) -> float | None:
    """Refuse "nan", which is beyond no bound."""
    if value is not None and math.isnan(value):
        raise typer.BadParameter("nan is not a number")
    return value


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...")],
    target: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, callback=_number, help="Accuracy to compare at [default: the highest that all reached]"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the plots [default: the run's; of several runs the current one]"),
    ] = None,
    plots: Annotated[bool, typer.Option(help="Write the plots.")] = True,
) -> None:
    """Show a run again, or several side by side: what rounds, seconds and bytes an accuracy cost.

    RUN_DIR is the folder of a run, with config.toml and record.jsonl.
    """
    with _user_errors():
        from .report import print_comparison, print_report, write_comparison, write_plots

        console = Console()
        records = [read_record(folder) for folder in folders]
        written: list[Path] = []
        if len(records) == 1:
            print_report(records[0], console)
            written = write_plots(records[0], out or folders[0]) if plots else []
        else:
            print_comparison(records, console, target)
            path = write_comparison(records, (out or Path()) / "compare.png") if plots else None
            written = [path] if path is not None else []
        for path in written:
            console.print(str(path), markup=False, highlight=False, soft_wrap=True)


@app.command()
def doctor() -> None:
    """Show versions, devices, which body of every op will run here and why, and whether the demo's packages are there.

    Exits with 1 when an op has no body that could run.
    """
    from .doctor import print_doctor

    if not print_doctor(Console()):
        raise typer.Exit(1)


def main() -> None:
    """The entry point ``fibecfed``: a mistake in the command itself is one line too, not a box of several."""
    # PEFT imports it where it is installed, and it warns of kernels that it lacks; the driver does not quantise
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        code = app(standalone_mode=False)
    except click.UsageError as error:
        code = error.exit_code
        if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):  # since click 8.2
            error.show()
        else:
            where = error.ctx.command_path if error.ctx is not None else "fibecfed"
            typer.echo(f"fibecfed: {' '.join(error.format_message().split())} (see `{where} --help`)", err=True)
    except click.Abort:
        code = 130
    sys.exit(code)


def _config(job: Path | None, settings: list[str] | None, short: dict[str, str | None]) -> RunConfig:
    """Settings of the file, then of --set, then of the options that stand for a setting."""
    given = [f"{key}={value}" for key, value in short.items() if value is not None]
    return load_config(job, [*(settings or []), *given])


def _follow(simulate: Callable[[Observer], RunRecord]) -> None:
    """Run, showing how far it is, then what came out; an interruption says what is kept."""
    from .progress import RichObserver
    from .report import print_report

    console = Console()
    with RichObserver(console) as observer:
        try:
            record = simulate(observer)
        except KeyboardInterrupt:
            kept = "nothing was written"
            if observer.path is not None:
                kept = f"{observer.path} keeps {observer.rounds} of {observer.total_rounds} rounds"
            if observer.initialized:
                kept += f", `fibecfed resume {observer.path}` goes on"
            typer.echo(f"interrupted: {kept}", err=True)
            raise typer.Exit(130) from None
    print_report(record, console)
    if record.path is not None:
        console.print(f"{record.path}: record, plots and adapter", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _user_errors() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted: nothing was written", err=True)
        raise typer.Exit(130) from None
    except FloatingPointError as error:  # training diverged: the record keeps the rounds before
        _complain(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        _complain(f"{error.filename}: {error.strerror}")
    except ValueError as error:
        loaded = ((sys.modules.get(module), name) for module, name in USER_ERRORS)
        if not isinstance(error, tuple(getattr(module, name) for module, name in loaded if module is not None)):
            raise
        _complain(str(error))


def _complain(message: str) -> None:
    typer.echo(f"fibecfed: {' '.join(message.split())}", err=True)
    raise typer.Exit(2)


def _samples_table(title: str, columns: dict[str, list[object]], chosen: list[int]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, expand=True)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("label", no_wrap=True)
    table.add_column("text", no_wrap=True, overflow="ellipsis", ratio=1)
    for index in chosen:
        text = " | ".join(str(columns[key][index]) for key in ("text", "pair") if key in columns)
        label = escape(str(columns["label"][index]))  # what looks like rich's markup is somebody's text
        table.add_row(f"{columns['score'][index]:.4g}", label, escape(" ".join(text.split())))
    return table

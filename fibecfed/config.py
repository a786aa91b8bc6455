"""The configuration of a run, read from TOML and written back. Its sections are in :mod:`fibecfed.sections`."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from .sections import Curriculum, Data, Eval, Gal, Model, Neurons, Partition, Section, Text, Train, Wire

WIDTH = 120  # columns of a described configuration


class ConfigError(ValueError):
    """A configuration that cannot be used; one line that names the file or option, the key and what was wanted."""


class RunConfig(Section):
    """One run; the defaults are the demo job. Frozen: :func:`load_config` builds a changed one."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = Field(
        default=None,
        description='letters, digits, ".", "_", "-": the folder of the run; unset: the names of data and model',
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(default=42, description="of every random choice")
    out: Text = Field(default="runs", description="folder that holds the runs")
    device: Annotated[str, Field(pattern=r"^(auto|cpu|(cuda|xpu)(:\d+)?)$")] = Field(
        default="auto", description='"auto" (CUDA if there is one), "cpu", "cuda", "cuda:1" or "xpu"'
    )
    autocast: bool = Field(default=False, description="bfloat16 autocast in forward and backward passes")
    data: Data = Data()
    model: Model = Model()
    partition: Partition = Partition()
    train: Train = Train()
    curriculum: Curriculum = Curriculum()
    gal: Gal = Gal()
    neurons: Neurons = Neurons()
    wire: Wire = Wire()
    eval: Eval = Eval()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.train.per_round > self.partition.devices:
            raise ValueError(
                f"train.per_round = {self.train.per_round}: wanted at most partition.devices = {self.partition.devices}"
            )
        if self.partition.scheme == "key" and self.data.key is None and self.data.source != "demo":
            raise ValueError('partition.scheme = "key": wants data.key too, the column that says whose sample it is')
        return self

    @property
    def run_name(self) -> str:
        """``name``, or one made of the data's and the model's names ("demo", "trec-smollm2", …)."""
        if self.name is not None:
            return self.name
        stems = (
            re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source).stem) for source in (self.data.source, self.model.source)
        )
        return "-".join(dict.fromkeys(stem.strip(".-_") or "run" for stem in stems))


def load_config(path: Path | str | None = None, overrides: Sequence[str] = (), option: str = "--set") -> RunConfig:
    """Read a TOML file (None: the defaults, which are the demo job) and apply ``"section.key=value"`` overrides.

    ``option``: what errors call an override.

    A value is read as TOML (``12``, ``2e-3``, ``true``, ``["q_proj"]``), else as bare text. "none" switches a nullable
    number off.

    Raises:
        ConfigError: missing or malformed file, unknown key (the nearest known one is named), wrong type, bad value.
    """
    table = {} if path is None else _read_toml(Path(path))
    overridden: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            raise ConfigError(f"{option} {override}: wanted section.key=value")
        overridden[key] = override
        _put(table, key, _parse_value(key, text.strip()), f"{option} {override}")
    try:
        return RunConfig.model_validate(table)
    except ValidationError as error:
        errors = error.errors()
    key, message = _explain(errors[0], table, list(overridden))
    origin = f"{option} {overridden[key]}: " if key in overridden else f"{path}: " if path is not None else ""
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    raise ConfigError(" ".join(f"{origin}{message}{more}".split("\n")))


def dump_config(config: RunConfig) -> str:
    """``config`` as TOML that :func:`load_config` reads back to an equal one; unset keys are left out."""
    return tomli_w.dumps(_table(config))


def flat_settings(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(section.key, value) of nested tables."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat_settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def describe_config(config: RunConfig) -> str:
    """:func:`dump_config` with every key's meaning beside it; unset keys are shown as comments."""
    lines = ["# A run of fibecfed: `fibecfed run THIS_FILE`. Every key may be left out.", ""]

    def describe(section: Section) -> None:
        table = _table(section)
        for key, field in type(section).model_fields.items():
            if isinstance(getattr(section, key), Section):
                continue
            setting = f"{key} = {_value(table[key])}" if key in table else f"# {key} ="
            meaning = f"{field.description}{_choices(field)}"
            line = f"{setting:<30}  # {meaning}"
            if len(line) > WIDTH:
                lines.extend(wrap(meaning, WIDTH, initial_indent="# ", subsequent_indent="#   "))
                line = setting
            lines.append(line)

    describe(config)
    for key, section in config:
        if isinstance(section, Section):
            lines.extend(["", f"[{key}]  # {type(section).__doc__}"])
            describe(section)
    return "\n".join(lines) + "\n"


def _table(section: Section) -> dict[str, Any]:
    """The section as a TOML table: unset keys left out, a number switched off against its default as "none"."""
    result: dict[str, Any] = {}
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, Section):
            result[key] = _table(value)
        elif value is not None:
            result[key] = list(value) if isinstance(value, tuple) else value
        elif field.default is not None or key in section.nothing_is_said:
            result[key] = "none"
    return result


def _value(value: Any) -> str:
    if isinstance(value, list):  # tomli_w would write it on several lines
        return f"[{', '.join(map(_value, value))}]"
    return tomli_w.dumps({"v": value}).removeprefix("v = ").strip()


def _choices(field: FieldInfo) -> str:
    """ " (a, b, c)" where the description does not name every choice itself."""
    annotation: Any = field.annotation
    choices = annotation.__args__ if getattr(annotation, "__origin__", None) is Literal else ()
    missing = [choice for choice in choices if choice not in (field.description or "")]
    return f" ({', '.join(choices)})" if missing else ""


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        problem = "no such file"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problem = f"is not TOML: {' '.join(str(error).split())}"
    raise ConfigError(f"{path}: {problem}")


def _fields() -> Iterator[tuple[str, FieldInfo]]:
    """Every known key, dotted, sections included."""
    for key, field in RunConfig.model_fields.items():
        yield key, field
        if isinstance(field.default, Section):
            yield from ((f"{key}.{leaf}", inner) for leaf, inner in type(field.default).model_fields.items())


def _parse_value(key: str, text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = parsed["value"] if len(parsed) == 1 else text
    # A column or file may be called 2024 or true, a choice 2: where text is wanted, only a quoted value is parsed.
    field = dict(_fields()).get(key)
    annotation = "" if field is None else str(field.annotation)
    wants_text = ("str" in annotation or "Literal" in annotation) and "list" not in annotation
    return text if wants_text and not isinstance(value, str) else value


def _put(table: dict[str, Any], key: str, value: Any, override: str) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{override}: {section} is a value, not a section")
    table[leaf] = value


def _explain(error: Any, table: dict[str, Any], overridden: Sequence[str]) -> tuple[str, str]:
    """The key that a pydantic error about ``table`` is about, and one line about it."""
    known = dict(_fields())
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        key = next((whole for whole in overridden if whole.startswith(f"{key}.")), key)
        sections = [name for name, field in known.items() if isinstance(field.default, Section)]
        meant = sections if isinstance(error["input"], dict) and key not in overridden else list(known)
        nearest = _nearest(key, meant)
        section = key.rpartition(".")[0]
        leaves = [name.removeprefix(f"{section}.") for name in known if section and name.startswith(f"{section}.")]
        hint = f"; did you mean {nearest}?" if nearest else f"; {section} has {', '.join(leaves)}" if leaves else ""
        return key, f"{key} is no known key{hint}"
    while location and ".".join(location) not in known:
        location.pop()  # the path goes on into lists and unions
    key = ".".join(location)
    if error["type"] == "value_error":
        return key, (f"{key}: " if key else "") + str(error["ctx"]["error"])
    match error["type"]:
        case "model_type" | "dict_type":
            wanted = "a section"
        case "string_pattern_mismatch":
            wanted = known[key].description or ""
        case "missing":
            wanted = "one more value"
        case "too_short":
            wanted = f"at least {error['ctx']['min_length']} value(s)"
        case "too_long":
            wanted = f"at most {error['ctx']['max_length']} value(s)"
        case "string_too_short":
            wanted = "a text that is not empty"
        case _:
            wanted = " ".join(str(error["msg"]).split()).removeprefix("Input should be ")
    value: Any = table  # not error["input"], which of a list may be one element
    for part in location:
        value = value[part] if isinstance(value, dict) and part in value else error["input"]
    return key, f"{key} = {_shown(value)}: wanted {wanted}"


def _shown(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)


def _nearest(key: str, known: list[str]) -> str | None:
    """The known key that ``key`` was meant to be: in its own section, of nearly the same spelling, or the same name in
    another section."""
    section, _, leaf = key.rpartition(".")
    known = [name for name in known if not any(other.startswith(f"{name}.") for other in known)]  # a section is no key
    leaves = {name.rpartition(".")[2]: name for name in known}
    own = {name.rpartition(".")[2]: name for name in known if section and name.startswith(f"{section}.")}
    whole = {} if own else dict(zip(known, known, strict=True))  # of a known section, its own keys are meant
    for word, candidates in ((leaf, own), (key, whole), (leaf, leaves)):
        if close := difflib.get_close_matches(word, list(candidates), n=1):
            return candidates[close[0]]
    return None

"""Reading a header's JSON with nothing trusted: every key once, integers only, fields of their form."""

from __future__ import annotations

import json
import re
from typing import Any

from .errors import DuplicateKeyError, HeaderError, MetadataError


def parsed(text: bytes) -> dict[str, Any]:
    """The JSON object of a header. Raises HeaderError for anything else."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise DuplicateKeyError("header", f"key {short(twice)} stands twice")
        return result

    def refuse(number: str) -> Any:
        raise HeaderError("header", f"number {short(number)}, wanted only integers")

    def integer(digits: str) -> int:
        return int(digits) if len(digits) <= 19 and digits != "-0" else refuse(digits)

    try:
        header = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=distinct,
            parse_int=integer,
            parse_float=refuse,
            parse_constant=refuse,
        )
    except HeaderError:
        raise
    except (ValueError, RecursionError) as error:
        raise HeaderError("header", f"not JSON: {short(str(error))}") from None
    if not isinstance(header, dict):
        raise HeaderError("header", f"{type(header).__name__}, wanted a JSON object")
    if b"\\u" in text:  # an escape can name half of a character, which no other reader takes
        try:
            json.dumps(header, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise HeaderError("header", "an escaped surrogate without its other half, wanted text") from None
    return header


def text_field(metadata: dict[str, Any], name: str, form: str) -> str:
    """A metadata field. Raises MetadataError unless it is text of a form."""
    value = metadata.get(name)
    if not isinstance(value, str) or not re.fullmatch(form, value, re.ASCII):
        raise MetadataError(f"metadata.{name}", f"{short(value)}, wanted text of the form {form}")
    return value


def same_integers(found: Any, wanted: tuple[int, ...]) -> bool:
    """Equal as lists of integers; JSON's true is not 1."""
    return isinstance(found, list) and all(type(v) is int for v in found) and found == list(wanted)


def short(value: object) -> str:
    """What a message holds, cut to a length fit for an error; nested values by their type only, they may be deep."""
    if isinstance(value, list) and all(type(v) is int for v in value):
        text = repr(value[:20])
    elif isinstance(value, list | dict):
        text = type(value).__name__
    else:
        text = repr(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:77]}…"

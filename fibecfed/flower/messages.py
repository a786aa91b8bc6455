"""What the two apps say to each other: small values as JSON in a ConfigRecord, an adapter as one array of bytes.

Whatever arrives is checked against its type before it is used: a node can send anything.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

RECORD, TEXT, ADAPTER = "fibecfed", "json", "adapter"
Count = Annotated[int, Field(ge=0, lt=2**53)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class MessageError(ValueError):
    """A message that is not what was asked for; says what is wrong with it."""


class _Values(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Nothing(_Values):
    """An answer that says only that it is done; a question that needs no more than its name."""


class Hello(_Values):
    """A node: which part of the run's data is its own, or how many samples and which classes it has itself, and whether
    they are pairs of texts."""

    partition: Count | None
    train: Count = 0
    test: Count = 0
    classes: list[str] | None = None
    pair: bool = False


class Place(_Values):
    """Which device a node is; the classes of all devices, where they have data of their own; digests of what must be
    the same there."""

    index: Count
    classes: list[str] | None = None
    alike: dict[str, str]


class Spectrum(Place):
    """Step 4 on one layer's values, or all."""

    layer: Count | None


class Work(Place):
    """What travels, and which rows of the rest are active; the round, and the share of the data in it."""

    gal: list[Count]
    shares: dict[Count, Share] = Field(default_factory=dict)
    round: Count = 0
    share: Share = 1.0


class Test(Work):
    """What to test besides the device's own model: the global one, where the server has no samples."""

    whole: bool
    own: bool


class Last(Work):
    """The last upload: the layers that did not travel."""

    dtype: Literal["float32", "bfloat16", "float16", "int8"]


class Left(_Values):
    """What is left on a device: where it never trained, no adapter comes along."""

    trained: bool


class Sensitivities(_Values):
    """I_l of every transformer block."""

    values: list[float]


class Decided(_Values):
    """A device's lossless.Decision."""

    found: bool
    m: Count
    dim: Count
    share: Share | None
    eigenvalues: list[float]
    weights: list[float]
    lipschitz: float

    def problem(self, values: int) -> str:
        """What is wrong with it, for an adapter of so many values."""
        return "" if self.m <= self.dim <= values else f"m = {self.m} of dim = {self.dim}, of {values} values"


class Trained(_Values):
    """A device's TrainResult."""

    loss: float
    samples: Count
    rows: Count

    def problem(self, samples: int, rows: int) -> str:
        """What is wrong with it, where it can be at most so many samples and rows."""
        if self.samples > samples or self.rows > rows:
            return f"trained on {self.samples} samples and {self.rows} rows, wanted at most {samples} and {rows}"
        return ""


class Tested(_Values):
    """Right answers of the global and of the device's own model, where asked for, of so many."""

    tested: Annotated[int, Field(ge=1, lt=2**53)]
    whole: Count | None
    own: Count | None

    def problem(self, tested: int, whole: bool, own: bool) -> str:
        """What is wrong with it, where the device has so many test samples, and ``whole`` and ``own`` were asked
        for."""
        if self.tested != tested:
            return f"tested on {self.tested} samples, wanted its {tested}"
        if (whole and self.whole is None) or (own and self.own is None):
            return "an answer is missing"
        return "more right than tested" if max(self.whole or 0, self.own or 0) > self.tested else ""


Values = TypeVar("Values", bound=BaseModel)


def encode(values: BaseModel, adapter: ArrayRecord | None = None) -> RecordDict:
    """The records of a question or an answer."""
    records = RecordDict({RECORD: ConfigRecord({TEXT: values.model_dump_json()})})
    if adapter is not None:
        records[ADAPTER] = adapter
    return records


def encode_adapter(message: Tensor) -> ArrayRecord:
    """A message of WirePlan, uint8 (bytes,): a copy, which any number of questions may share."""
    data = message.cpu().numpy().tobytes()
    return ArrayRecord({ADAPTER: Array("uint8", (len(data),), "safetensors", data)})


def decode(kind: type[Values], records: RecordDict) -> Values:
    """The values of a question or an answer. Raises MessageError."""
    record = records.get(RECORD)
    text = record.get(TEXT) if isinstance(record, ConfigRecord) else None
    if not isinstance(text, str):
        raise MessageError(f"no {TEXT!r} in record {RECORD!r}, wanted a {kind.__name__}")
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([kind.__name__, *map(str, first["loc"])])
        raise MessageError(f"{where}: {first['msg']}") from None


def decode_adapter(records: RecordDict) -> Tensor:
    """The bytes of an adapter, uint8 (bytes,), unchecked: WirePlan checks them. Raises MessageError."""
    record = records.get(ADAPTER)
    array = record.get(ADAPTER) if isinstance(record, ArrayRecord) else None
    if array is None:
        raise MessageError(f"no {ADAPTER!r} in record {ADAPTER!r}, wanted an adapter")
    return torch.frombuffer(bytearray(array.data or b"\0"), dtype=torch.uint8)[: len(array.data)]

"""Adapters as safetensors messages: packed in one launch, read with nothing trusted, averaged as they arrive."""

from .errors import WireError
from .format import Message, WireDtype
from .mean import aggregate
from .plan import WirePlan

__all__ = ["Message", "WireDtype", "WireError", "WirePlan", "aggregate"]

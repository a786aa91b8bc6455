"""What two ends of a wire must agree on about a model: its configuration and its adapters'."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

# of a configuration, what does not say which model it is; a model sets some of it itself when it is first used or saved
VOLATILE_CONFIG = (
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "id2label", "label2id", "problem_type",
    "use_cache", "return_dict", "output_attentions", "output_hidden_states", "architectures", "pad_token_id",
)  # fmt: skip
ADAPTER_KEYS = (
    "peft_type", "task_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias",
    "lora_bias", "target_modules",
)  # fmt: skip
MEANING_KEYS = (  # that few adapters have: named where they are set
    "layer_replication", "alora_invocation_tokens", "trainable_token_indices", "target_parameters",
)  # fmt: skip
BEGUN_APART = (True, False, "gaussian", "orthogonal", "eva")  # ways to begin that leave the base model as it is


def identity_of(model: nn.Module) -> Mapping[str, str]:
    """The base model's configuration (hashed), and the adapters'."""
    config = getattr(model, "config", None)
    described: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})  # type: ignore[union-attr]
    stable = {k: v for k, v in described.items() if k not in VOLATILE_CONFIG}
    digest = hashlib.sha256(json.dumps(stable, sort_keys=True, default=str).encode()).hexdigest()
    adapters = {
        name: {key: _plain(getattr(c, key, None)) for key in ADAPTER_KEYS} | _unusual(c)
        for name, c in getattr(model, "peft_config", {}).items()
    }
    return MappingProxyType(
        {
            "base_model": f"{described.get('model_type', type(model).__name__)}-{digest[:16]}",
            "adapter": json.dumps(adapters, sort_keys=True),
        }
    )


def _unusual(config: Any) -> dict[str, object]:
    """What changes the meaning of an adapter's values and is seldom there. PiSSA and the like take their beginning out
    of the base weights, which are others then."""
    named = {key: _plain(getattr(config, key, None)) for key in MEANING_KEYS}
    begun = getattr(config, "init_lora_weights", True)
    if begun not in BEGUN_APART:
        named["init_lora_weights"] = _plain(begun)
    return {key: value for key, value in named.items() if value}


def _plain(value: object) -> object:
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return value if value is None or isinstance(value, (str, int, float, bool, list)) else str(value)

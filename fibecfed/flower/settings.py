"""A run's configuration out of Flower's: flat keys with one number, text or truth each."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import ConfigError, RunConfig, load_config

TIMEOUT = "timeout"  # seconds that the server waits for nodes and for their answers
DEFAULT_TIMEOUT = 3600.0
OF_THE_NODE = {"device", "model.source"}  # settings that a node's own configuration may change, beside those of data
FOR_THE_SERVER = {"name", "out"}  # settings that mean nothing on a node: what it has under these names is its own

Settings = Mapping[str, bool | int | float | str]


def run_config(values: Settings, node: Settings | None = None) -> RunConfig:
    """The run that ``run_config`` of a Flower context asks for; ``node``: with a node's own data, place of the model
    and device.

    What Flower has no type for is written as text: ``model.targets = '["q_proj"]'``. Raises ConfigError, also for a
    setting among the node's that is the whole run's; what is no setting is somebody else's.
    """
    given = {key: value for key, value in values.items() if key != TIMEOUT}
    for key, value in (node or {}).items():
        if key.startswith("data.") or key in OF_THE_NODE:
            given[key] = value
        elif key.partition(".")[0] in RunConfig.model_fields.keys() - FOR_THE_SERVER:
            raise ConfigError(
                f"node config {key}={_text(value)}: a setting of the whole run, wanted in the app's configuration; "
                f"a node's own are data.* and {', '.join(sorted(OF_THE_NODE))}"
            )
    return load_config(None, [f"{key}={_text(value)}" for key, value in given.items()], option="run config")


def timeout(values: Settings) -> float:
    """Seconds. Raises ConfigError for what is none."""
    found = values.get(TIMEOUT, DEFAULT_TIMEOUT)
    if isinstance(found, bool | str) or not 0 < found < float("inf"):
        raise ConfigError(f"run config {TIMEOUT}={_text(found)}: wanted seconds, more than 0")
    return float(found)


def _text(value: bool | int | float | str) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

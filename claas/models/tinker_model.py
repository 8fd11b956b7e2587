"""The base model on a Tinker server, as far as it must be known here: its tokenizer and template, and its size. No weights, no torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from claas.core.errors import ConfigurationError
from claas.core.settings import TINKER_BASE_MODEL, Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TinkerModel:
    """`id` is what the server and requests call it; `n_params` is an estimate."""

    id: str
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    max_context: int
    n_params: int
    stop_ids: frozenset[int]


def load_tinker_model(settings: Settings, served: Mapping[str, int | None]) -> TinkerModel:
    """What the settings name, of the models that the server has. Blocks. Raises ConfigurationError."""
    name = settings.base_model_id or TINKER_BASE_MODEL
    if name not in served:
        there = ", ".join(map(repr, sorted(served)[:20])) or "none"
        raise ConfigurationError(f"the Tinker server has no base model {name!r}: set CLAAS_BASE_MODEL_ID to one of its own, {there}")
    source: str | Path = settings.tinker_tokenizer or name
    if Path(source).is_dir():
        source = Path(source).resolve()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        config = AutoConfig.from_pretrained(source).get_text_config(decoder=True)
    except Exception as error:  # each library below has its own
        log.info("loading the tokenizer failed", exc_info=error)
        said = str(error).partition("\n")[0][:200]
        raise ConfigurationError(
            f"the tokenizer of {name!r} cannot be loaded: set CLAAS_TINKER_TOKENIZER to the model on the hub, or to a folder with its "
            f"tokenizer and config.json ({type(error).__name__}: {said})"
        ) from error
    if tokenizer.chat_template is None:
        raise ConfigurationError(f"the base model {name!r} has no chat template: choose an instruction-tuned model")
    limits = [limit for limit in (served[name], settings.max_context, config.max_position_embeddings) if limit is not None]
    return TinkerModel(name, tokenizer, int(config.vocab_size), min(limits), _parameters(config), _stop_ids(source, tokenizer))


def _stop_ids(source: str | Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that end a reply: those of the model's generation config, if it has one, and the tokenizer's end of sequence."""
    try:
        configured = GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:
        configured = None
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*ids, tokenizer.eos_token_id) if token is not None)


def _parameters(config: PretrainedConfig) -> int:
    """About how many parameters a decoder of this shape has: enough to tell a small model from a large one."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    return int(config.vocab_size * hidden + layers * hidden * (4 * hidden + 3 * config.intermediate_size))

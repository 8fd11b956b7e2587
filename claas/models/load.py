"""Settings → the base model in memory, frozen and checked. It knows no adapter, no request and no lesson."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as transformers_logging

from claas.core.errors import ConfigurationError
from claas.core.settings import Settings
from claas.models.base_model import DescribedModel, LoadedModel
from claas.models.compute import in_fresh_thread
from claas.models.default_model import DEFAULT_MODEL_ID, default_model

log = logging.getLogger(__name__)


def load_base_model(settings: Settings, *, progress: bool = False, on_host: bool = False) -> LoadedModel:
    """Load the base model that the settings name, or the default one, ready to serve and to train adapters on.

    With `on_host` its weights stay in host memory, from where whoever trains takes them to `device`.

    Raises:
        ConfigurationError: it cannot be found, read, or served; the message says what to set.
    """
    return in_fresh_thread("claas-load", lambda: _load(settings, progress, on_host))


def _load(settings: Settings, progress: bool, on_host: bool) -> LoadedModel:
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    source = settings.base_model_id
    path: str | Path = default_model(settings.cache_dir, progress=progress) if source is None else _local(source)
    trust = settings.trust_remote_code is not None
    attention = settings.attn_implementation
    if attention == "flash_attention_2" and not (device.type == "cuda" and dtype == torch.bfloat16 and is_flash_attn_2_available()):
        raise ConfigurationError(
            "flash_attention_2 needs a CUDA GPU, bfloat16 and the package flash-attn: install it, or set CLAAS_ATTN_IMPLEMENTATION to sdpa"
        )
    # The check below runs where the weights are, and that kernel runs on the GPU only.
    at_first = "sdpa" if on_host and attention == "flash_attention_2" else attention
    try:
        with _quiet(progress):
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
            module = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=at_first, trust_remote_code=trust)
    except Exception as error:  # each library below has its own
        log.warning("loading the base model failed", exc_info=error)
        raise _cannot_be_loaded(source or DEFAULT_MODEL_ID, error) from error
    module = module.to("cpu" if on_host else device).eval().requires_grad_(False)
    if tokenizer.chat_template is None:
        raise ConfigurationError(f"the base model {_model_id(source)!r} has no chat template: choose an instruction-tuned model")
    _check_servable(module, _model_id(source))
    if at_first != attention:
        module.set_attn_implementation(attention)
    return LoadedModel(
        id=_model_id(source), path=path, config=module.config, tokenizer=tokenizer, module=module, device=device, dtype=dtype
    )


def describe_base_model(settings: Settings) -> DescribedModel:
    """The base model that the settings name, without its weights. Blocks. Raises ConfigurationError."""
    source = settings.base_model_id
    assert source is not None
    path, trust = _local(source), settings.trust_remote_code is not None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    except Exception as error:  # each library below has its own
        log.warning("reading the base model's config failed", exc_info=error)
        raise _cannot_be_loaded(source, error) from error
    if tokenizer.chat_template is None:
        raise ConfigurationError(f"the base model {_model_id(source)!r} has no chat template: choose an instruction-tuned model")
    n_params = sum(p.numel() for p in module.parameters())
    return DescribedModel(id=_model_id(source), config=module.config, tokenizer=tokenizer, n_params=n_params)


def _cannot_be_loaded(name: str, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"the base model {name!r} cannot be loaded ({type(error).__name__}): set CLAAS_BASE_MODEL_ID to a model of the Hugging Face hub or "
        "to a folder that holds one; the log says more"
    )


def _model_id(source: str | None) -> str:
    """What requests call the model: the hub id, the folder's name, or the default's name."""
    if source is None:
        return DEFAULT_MODEL_ID
    return Path(source).resolve().name if Path(source).is_dir() else source


def _local(source: str) -> str | Path:
    """A folder as a path, so that it is never looked up on the hub; anything else is a hub id."""
    return Path(source).resolve() if Path(source).is_dir() else source


def choose_device(wanted: str) -> torch.device:
    """`auto`: the GPU where there is one. Raises ConfigurationError for a device that this machine does not have.

    Who wants the CPU has no GPU looked for: torch would remember that there was none, in a snapshot that is later started with one.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[wanted]:
        raise ConfigurationError(f"device {wanted!r} is not available on this machine: set CLAAS_DEVICE=auto")
    return torch.device(wanted, 0) if wanted == "cuda" else torch.device(wanted)


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where the hardware computes in it; elsewhere it would be emulated, slower than float32."""
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        cpu = torch.cpu.get_capabilities()
        native = bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def _check_servable(module: PreTrainedModel, name: str) -> None:
    """Server and trainer run the backbone, then the LM head on the positions they need: that must be all there is to the model."""
    config: PretrainedConfig = module.config.get_text_config(decoder=True)
    other = set(get_layer_types_and_kwargs(config)[0]) - {"full_attention"}
    if other:
        raise ConfigurationError(f"the base model {name!r} has layers of type {min(other)!r}: choose one with full attention throughout")
    head = module.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ConfigurationError(f"the base model {name!r} has no LM head: choose a causal language model")
    ids = torch.arange(8, device=module.device)[None] % config.vocab_size
    with torch.inference_mode():
        whole, parts = module(input_ids=ids).logits, head(module.get_decoder()(input_ids=ids).last_hidden_state)
    if not torch.isfinite(whole).all() or not torch.allclose(whole, parts, atol=1e-2, rtol=1e-2):
        raise ConfigurationError(f"the base model {name!r} computes its logits in a way that is not supported: choose another model")


@contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Without `progress`, no bars of transformers on the terminal."""
    shown = transformers_logging.is_progress_bar_enabled()
    if progress or not shown:
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()

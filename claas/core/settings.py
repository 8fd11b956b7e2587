"""All settings, and the only reader of the environment and of config files.

A setting comes from, in this order: the command line, the environment, the TOML file named by `CLAAS_CONFIG` (keys are the field names
below), the default. An unknown `CLAAS_…` variable or file key is an error: a misspelt setting must not be ignored.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

import platformdirs
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from claas.core.adapter_id import parse_adapter_id
from claas.core.errors import BadRequest, ConfigurationError
from claas.core.types import EngineKind
from claas.core.usage import TokenUse

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
CONFIG_VARIABLE = "CLAAS_CONFIG"
TINKER_BASE_MODEL = "Qwen/Qwen3-30B-A3B"
MODAL_BASE_MODEL = "Qwen/Qwen3-8B"
MODAL_BASE_MODEL_FLAGS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3")
TINKER_URL = "https://tinker.thinkingmachines.dev/services/tinker-prod"
SECRETS = ("tinker_api_key",)  # from the environment only
APP_NAME = r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,47}$"  # leaves room for the names of its Volume and its Dict, at most 64 long
CLIENT_VARIABLES = ("CLAAS_URL", "CLAAS_API_KEY")  # read by the command line's client, not by the service


class Settings(BaseSettings):
    """Field `x` is read from `CLAAS_X`, but for those with an alias of their own (documented upstream, so kept)."""

    model_config = SettingsConfigDict(env_prefix="CLAAS_", extra="forbid", frozen=True, populate_by_name=True)

    # Serving
    host: str = Field("127.0.0.1", description="Address to bind. Anything but loopback needs api_keys.")
    port: int = Field(8080, ge=0, le=65535, description="Port to bind; 0 takes a free one.")
    api_keys: tuple[SecretStr, ...] = Field((), description="Bearer keys, as a JSON list. Empty: no key is asked, loopback only.")
    max_body_bytes: int = Field(4 * 2**20, ge=1024, description="Larger request bodies are answered 413.")
    default_adapter: str = Field("assistant", description="Adapter created at the first start, so that a first chat can learn.")
    default_max_tokens: int = Field(512, ge=1, description="Reply length where a request does not say max_tokens.")

    # Model
    distill_execution_mode: EngineKind = Field("local", description="Training backend: local, tinker or modal.")
    base_model_id: str | None = Field(
        None,
        description="Hub id or local folder. Unset: SmolLM2-135M-Instruct, embedded; in tinker mode Qwen/Qwen3-30B-A3B; in modal mode "
        "Qwen/Qwen3-8B, unless modal_serving is embedded.",
    )
    trust_remote_code: str | None = Field(None, description="Name the base model here again to run code that its repository ships.")
    allowed_init_base_models: tuple[str, ...] = Field(
        (), description="Base models /v1/lora/init may name, as a JSON list. Empty: the served one."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="Where the model runs.")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="auto: bfloat16 where the device computes in it, else float32."
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="Attention kernel of the trainer.")

    # Embedded inference
    max_batch: int = Field(32, ge=1, le=256, description="Replies that are sampled at the same time.")
    max_queue: int = Field(256, ge=1, description="Requests that may wait for a slot; more are answered 429.")
    max_context: int | None = Field(None, ge=64, description="Prompt and reply tokens of one request. Unset: what the model was built for.")

    # vLLM, in place of the embedded model
    vllm_base_url: str | None = Field(
        None,
        validation_alias="VLLM_BASE_URL",
        description="A vLLM that serves the base model, see docs/hybrid.md. Unset: embedded.",
    )
    vllm_api_key: SecretStr | None = Field(None, validation_alias="VLLM_API_KEY", description="Key that vLLM asks for, if it does.")
    vllm_lora_root: Path | None = Field(None, description="The adapters' folder as vLLM sees it. Unset: the same path as here.")
    vllm_max_adapters: int = Field(32, ge=2, description="Adapter versions that vLLM knows at once; others are loaded when asked for.")
    vllm_release: Literal["auto", "none", "kv_release", "sleep"] = Field(
        "auto", description="How vLLM makes room for a step; auto takes the least that the measured free memory allows."
    )
    vllm_gate_timeout_s: float = Field(
        180.0,
        gt=0,
        description="How long a request waits through an update before it is answered 503; more than feedback_drain_timeout_s.",
    )

    # Tinker
    tinker_api_key: SecretStr | None = Field(None, description="Key of the Tinker server; from the environment only.")
    tinker_base_url: str = Field(TINKER_URL, description="The Tinker server: the hosted one, or one of your own, see docs/tinker.md.")
    tinker_tokenizer: str | None = Field(
        None, description="Hub id or folder of the base model's tokenizer, template and config. Unset: base_model_id."
    )
    tinker_lora_rank: int = Field(32, ge=1, le=256, description="Rank of new adapters.")
    tinker_top_k: int = Field(20, ge=0, le=100, description="Likeliest tokens asked of a teacher, where the server tells them.")
    tinker_loss_reduction: Literal["auto", "sum", "sequence_mean"] = Field(
        "auto", description="What the server makes of token losses; auto: sum if it reports loss:sum, else means."
    )
    tinker_max_runs: int = Field(8, ge=2, description="Training runs held on the server at once, those being trained among them.")
    tinker_checkpoint_ttl_s: int | None = Field(None, ge=3600, description="When the server may delete checkpoints. Unset: never.")
    tinker_timeout_s: float = Field(600.0, gt=0, description="How long a single answer of the server may take.")
    tinker_patience_s: float = Field(30.0, gt=0, description="How long the server may be silent before a request is given up.")
    tinker_prices: dict[TokenUse, float] = Field(
        {}, description="Prices of a million tokens sampled, scored and trained, as a JSON object; shown in step records."
    )
    tinker_state_path: Path | None = Field(None, description="An upstream tinker_state.json, whose adapters are imported at the start.")

    # Modal
    modal_app: str = Field("claas", pattern=APP_NAME, description="The app on Modal; its Volume and its Dict are named after it.")
    modal_environment: str | None = Field(
        None, min_length=1, description="The app's environment on Modal. Unset: that of the Modal profile."
    )
    modal_gpu: str = Field(
        "L40S",
        min_length=1,
        description="GPU that lessons run on, as Modal names it, such as H100 or A100-80GB; read by claas modal deploy.",
    )
    modal_serving: Literal["vllm", "embedded"] = Field(
        "vllm", description="Who answers in modal mode: a vLLM in the app, or the embedded model in the service itself."
    )
    modal_vllm_gpu: str = Field("L40S", min_length=1, description="GPU of the app's vLLM; read by claas modal deploy.")
    modal_vllm_flags: tuple[str, ...] | None = Field(
        None,
        description="More flags of the app's vLLM, as a JSON list, such as its tool and reasoning parsers. Unset: those of Qwen3 for the "
        "default model, none for others; read by claas modal deploy.",
    )
    modal_max_containers: int = Field(
        4, ge=1, description="Lessons, of different adapters, that are trained at the same time; read by claas modal deploy."
    )
    modal_scaledown_s: int = Field(
        300, ge=2, le=1200, description="How long an idle container is kept, and paid for; read by claas modal deploy."
    )
    modal_timeout_s: int = Field(1800, ge=10, le=86_400, description="How long a lesson may train before it is stopped.")
    modal_start_timeout_s: int = Field(600, ge=1, description="How long a lesson or reply may wait for a container before it is given up.")
    modal_prices: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {}, description="Dollars a second by the GPU's name, as a JSON object, in place of the list prices; shown in step records."
    )
    modal_volume_path: PurePosixPath = Field(PurePosixPath("/adapters"), description="Where containers of the app see the adapters.")
    modal_models_path: PurePosixPath = Field(PurePosixPath("/models"), description="Where containers of the app keep base models.")
    modal_secrets: tuple[str, ...] = Field(
        (), description="Names of Modal secrets for the app's containers, as a JSON list, such as one that holds HF_TOKEN."
    )

    # Storage
    data_dir: Path = Field(Path(platformdirs.user_data_dir("claas")), description="Database, adapters and logs. One service at a time.")
    cache_dir: Path = Field(Path(platformdirs.user_cache_dir("claas")), description="The converted default model. Shared between services.")
    lora_root: Path | None = Field(None, description="Adapters' folder. Unset: data_dir/adapters.")
    database_url: str | None = Field(None, description="Any SQLAlchemy URL. Unset: SQLite in data_dir.")
    completion_cache_size: int = Field(10_000, ge=1, description="Rollouts kept; the oldest go first.")
    rollout_max_age_days: float = Field(30.0, gt=0, description="Rollouts older than this are removed.")
    keep_versions: int = Field(16, ge=2, description="Versions kept of each adapter; the oldest go first, never the latest.")

    # Feedback
    feedback_log_dir: Path | None = Field(
        None, validation_alias="FEEDBACK_LOG_DIR", description="One JSON file for each lesson. Unset: data_dir/feedback."
    )
    feedback_lock_timeout_s: float = Field(
        120.0, gt=0, validation_alias="FEEDBACK_LOCK_TIMEOUT_S", description="How long feedback waits for its adapter before 409."
    )
    feedback_drain_timeout_s: float = Field(
        120.0, gt=0, validation_alias="FEEDBACK_DRAIN_TIMEOUT_S", description="How long an update waits for running replies to end."
    )
    feedback_wake_on_failure: bool = Field(
        True, validation_alias="FEEDBACK_WAKE_ON_FAILURE", description="Always true: vLLM is woken whatever becomes of a step."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        file = os.environ.get(CONFIG_VARIABLE)
        toml = (TomlConfigSettingsSource(settings_cls, toml_file=Path(file)),) if file else ()
        return (init_settings, env_settings, *toml)

    @field_validator("tinker_base_url")
    @classmethod
    def _tinker_url(cls, value: str) -> str:
        if not re.fullmatch(r"https?://[^/?#]+(/[^?#]*)?", value):
            raise ValueError(f"{value!r} is no URL such as http://127.0.0.1:8100")
        return value.rstrip("/")

    @field_validator("vllm_base_url")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not re.fullmatch(r"https?://[^/?#]+(/[^?#]*)?", value):
            raise ValueError(f"{value!r} is no URL such as http://127.0.0.1:8000")
        return value.rstrip("/").removesuffix("/v1")

    @field_validator("modal_volume_path", "modal_models_path")
    @classmethod
    def _mount(cls, value: PurePosixPath) -> PurePosixPath:
        if not value.is_absolute() or value == PurePosixPath("/") or ".." in value.parts:
            raise ValueError(f"{str(value)!r} is no place to mount a Volume, such as /adapters")
        return value

    @field_validator("default_adapter")
    @classmethod
    def _adapter_id(cls, value: str) -> str:
        return parse_adapter_id(value, param="default_adapter")

    @model_validator(mode="after")
    def _fail_closed(self) -> Self:
        if self.host not in LOOPBACK_HOSTS and not self.api_keys:
            raise ValueError(
                f"host {self.host!r} can be reached from other machines, so a key is needed: "
                "set CLAAS_API_KEYS='[\"a-long-random-key\"]', or keep host 127.0.0.1"
            )
        if not self.feedback_wake_on_failure:
            raise ValueError("FEEDBACK_WAKE_ON_FAILURE can only be true: a vLLM that is left asleep would answer nobody")
        if any(not key.get_secret_value().strip() for key in self.api_keys):
            raise ValueError("CLAAS_API_KEYS holds an empty key")
        pauses = self.vllm_base_url is not None and self.vllm_release != "none"
        if pauses and self.vllm_gate_timeout_s <= self.feedback_drain_timeout_s:
            raise ValueError(
                f"CLAAS_VLLM_GATE_TIMEOUT_S ({self.vllm_gate_timeout_s:g}) must be more than FEEDBACK_DRAIN_TIMEOUT_S "
                f"({self.feedback_drain_timeout_s:g}): requests wait while replies come to their end, and for the update after that"
            )
        if self.distill_execution_mode == "tinker" and self.vllm_base_url is not None:
            raise ValueError("VLLM_BASE_URL cannot be used in tinker mode, where the Tinker server answers: unset it")
        if self.distill_execution_mode == "tinker" and not self.tinker_api_key and self.tinker_base_url == TINKER_URL:
            raise ValueError("tinker mode needs a key: set CLAAS_TINKER_API_KEY, or CLAAS_TINKER_BASE_URL to a server of your own")
        if self.distill_execution_mode == "modal" and self.vllm_base_url is not None:
            raise ValueError(
                "VLLM_BASE_URL cannot be used in modal mode, where adapters are on a Volume that it does not see: unset it, and the app's "
                "own vLLM answers, or the embedded model with CLAAS_MODAL_SERVING=embedded"
            )
        if self.trust_remote_code is not None and self.trust_remote_code != self.base_model_id:
            raise ValueError(f"trust_remote_code names {self.trust_remote_code!r}, which is not the base model {self.base_model_id!r}")
        return self

    @property
    def tinker_key(self) -> str:
        """What the Tinker server is sent. One of your own may ask for none, but the SDK sends one all the same."""
        return self.tinker_api_key.get_secret_value() if self.tinker_api_key else "tml-self-hosted"

    @property
    def modal_base_model(self) -> str | None:
        """What the worker trains, and the service serves. None: the embedded default."""
        if self.base_model_id is None and self.modal_serving == "vllm":
            return MODAL_BASE_MODEL
        return self.base_model_id

    @property
    def modal_flags(self) -> tuple[str, ...]:
        """What the app's vLLM is told beside what CLaaS needs: which parsers suit the model, first of all."""
        if self.modal_vllm_flags is None and self.modal_base_model == MODAL_BASE_MODEL:
            return MODAL_BASE_MODEL_FLAGS
        return self.modal_vllm_flags or ()

    @property
    def adapters_dir(self) -> Path:
        return self.lora_root or self.data_dir / "adapters"

    @property
    def log_dir(self) -> Path:
        return self.feedback_log_dir or self.data_dir / "feedback"

    @property
    def sqlalchemy_url(self) -> str:
        return self.database_url or f"sqlite:///{self.data_dir / 'claas.db'}"


def load_settings(**overrides: Any) -> Settings:
    """Read the settings; `overrides` (the command line's) go over all else, those that are None are left out.

    Raises:
        ConfigurationError: with one line for each setting that is wrong or unknown.
    """
    _refuse_unknown_variables(os.environ)
    file = os.environ.get(CONFIG_VARIABLE)
    if file and not Path(file).is_file():
        raise ConfigurationError(f"{CONFIG_VARIABLE} names no file: {file!r}")
    _refuse_secrets(file)
    try:
        return Settings(**{key: value for key, value in overrides.items() if value is not None})
    except ValidationError as error:
        raise ConfigurationError("\n".join(_line(e) for e in error.errors())) from error
    except BadRequest as error:
        raise ConfigurationError(error.message) from error


def _line(error: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _refuse_secrets(file: str | None) -> None:
    """Raises ConfigurationError for a file that holds a secret of another service's."""
    try:
        written = tomllib.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{CONFIG_VARIABLE} names a file that is no TOML: {file!r}") from error
    for name in written.keys() & set(SECRETS):
        raise ConfigurationError(f"{name} is read from the environment only: set CLAAS_{name.upper()}, and take it out of the file")


def _refuse_unknown_variables(environment: Mapping[str, str]) -> None:
    known = {f"CLAAS_{name}".upper() for name in Settings.model_fields} | {CONFIG_VARIABLE, *CLIENT_VARIABLES}
    for name in environment:
        if name.startswith("CLAAS_") and name.upper() not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise ConfigurationError(
                f"{name} is not a setting" + (f": did you mean {close[0]}?" if close else "; docs/settings.md lists them")
            )

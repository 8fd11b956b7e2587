"""Models for tests: the real default one, fetched once for each machine, and a tiny random one. Heavy imports wait until asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs
import pytest
from hypothesis import settings

import claas  # noqa: F401 - it sets how threads wait, before any test imports torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from claas.models.base_model import LoadedModel
    from tests.modal_server.server import ModalDouble

# A busy machine is no wrong result.
settings.register_profile("claas", deadline=None)
settings.load_profile("claas")


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The default model's folder, in the ordinary cache folder: fetched and converted there if it is the first time."""
    from claas.models.default_model import default_model

    return default_model(Path(platformdirs.user_cache_dir("claas")))


@pytest.fixture(scope="session")
def loaded_model(model_dir: Path) -> LoadedModel:
    """The default model as the service loads it."""
    from claas.core.settings import Settings
    from claas.models.load import load_base_model

    return load_base_model(Settings(cache_dir=model_dir.parent))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama, its tokenizer and its ChatML template."""
    from tests.models.tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_model(tiny_model_dir: Path) -> LoadedModel:
    """The tiny model, loaded."""
    from tests.models.tiny import load_tiny_model

    return load_tiny_model(tiny_model_dir)


@pytest.fixture(scope="module")
def modal_double(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModalDouble]:
    """A double of Modal with the app deployed for the tiny model, which the SDK of this process calls while the module's tests run."""
    from tests.on_modal.stage import on_stage

    with on_stage(tmp_path_factory.mktemp("modal"), tiny_model_dir, CLAAS_MODAL_MAX_CONTAINERS="1") as server:
        yield server

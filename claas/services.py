"""The frozen bundle that routes get. `claas.wiring` builds it; nothing here chooses a backend."""

from __future__ import annotations

from dataclasses import dataclass

from claas.core.settings import Settings
from claas.inference.base import InferenceBackend
from claas.learning.feedback_store import FeedbackStore
from claas.learning.journal import Journal
from claas.learning.learner import Learner
from claas.learning.lifecycle import AdapterLifecycle
from claas.learning.retraction import Retraction
from claas.rollouts.store import RolloutStore
from claas.training.engine.base import TrainingEngine


@dataclass(frozen=True, slots=True)
class Services:
    """Everything a route may use."""

    settings: Settings
    base_model_id: str
    engine: TrainingEngine
    inference: InferenceBackend
    rollouts: RolloutStore
    feedback: FeedbackStore
    journal: Journal
    lifecycle: AdapterLifecycle
    learner: Learner
    retraction: Retraction

"""Teachers that outlive a lesson: the adapter as it has been on average (`ema`), or as it was some lessons ago (`snapshot`).

Both begin as the student itself and are stored beside the version that they belong to, so a rollback takes them back too. Only lessons
that ask for them keep them: after one that does not, they begin anew.

Shape legend
    I  in features   O  out features   R  rank

What is averaged is the product B·A, which is what the adapter does; an average of A and of B apart would be another matrix. A weighted
sum of two products is the product of their factors side by side, exactly; only where these would outgrow `EMA_RANKS` times the
student's rank are the smallest singular directions dropped. Targets are computed once a lesson, so the average is taken once a lesson
too: n gradient steps at a rate r count as one of 1 − (1 − r)ⁿ towards where they led.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from claas.adapters.store import TEACHER
from claas.core.types import TrainingConfig
from claas.models.lora import read_tensors

EMA_RANKS = 2
_LESSONS = "lessons"

TeacherMemory = Literal["ema", "snapshot"]
Adapter = Mapping[str, Tensor]
"""A and B of every layer, by parameter name; a teacher's rank need not be the student's."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """An adapter that judges, and for how many lessons it has been kept."""

    weights: Adapter
    lessons: int


def wanted_teachers(training: TrainingConfig) -> set[TeacherMemory]:
    """The remembered teachers that this lesson asks for."""
    kinds: tuple[TeacherMemory, ...] = ("ema", "snapshot")
    return {kind for kind in kinds if kind in (training.teacher, training.hindsight_teacher)}


def load_teachers(folder: Path, kinds: Iterable[TeacherMemory], student: Adapter) -> dict[TeacherMemory, Teacher]:
    """The teachers stored with a version; where there is none yet, the student."""

    def load(kind: TeacherMemory) -> Teacher:
        file = folder / TEACHER.format(kind=kind)
        if not file.is_file():
            return Teacher(student, 0)
        device = str(next(iter(student.values())).device)
        stored = read_tensors(file, device=device)
        return Teacher({name: stored[name] for name in student}, int(stored[_LESSONS]))

    return {kind: load(kind) for kind in kinds}


def after_lesson(
    teachers: Mapping[TeacherMemory, Teacher], student: Adapter, training: TrainingConfig, steps: int
) -> dict[TeacherMemory, Teacher]:
    """The teachers as a lesson of `steps` gradient steps leaves them."""
    after: dict[TeacherMemory, Teacher] = {}
    for kind, teacher in teachers.items():
        lessons = teacher.lessons + 1
        if kind == "ema":
            share = 1.0 - (1.0 - training.teacher_ema_rate) ** steps
            after[kind] = Teacher(average(teacher.weights, student, share), lessons)
        else:
            after[kind] = Teacher(student, 0) if lessons >= training.teacher_snapshot_every else Teacher(teacher.weights, lessons)
    return after


def save_teachers(folder: Path, teachers: Mapping[TeacherMemory, Teacher]) -> None:
    """Write them beside a version, in safetensors."""
    for kind, teacher in teachers.items():
        tensors = {name: tensor.cpu().contiguous() for name, tensor in teacher.weights.items()}
        save_file(tensors | {_LESSONS: torch.tensor(teacher.lessons)}, folder / TEACHER.format(kind=kind))


@torch.no_grad()
def average(old: Adapter, new: Adapter, share: float) -> dict[str, Tensor]:
    """The adapter whose product in every layer is (1 − share)·old + share·new, of at most `EMA_RANKS` times the rank of `new`."""
    averaged: dict[str, Tensor] = {}
    for a_name in (name for name in new if ".lora_A." in name):
        b_name = a_name.replace(".lora_A.", ".lora_B.")
        a_RI = torch.cat([old[a_name], new[a_name]])
        b_OR = torch.cat([(1.0 - share) * old[b_name], share * new[b_name]], dim=1)
        averaged[a_name], averaged[b_name] = _shortened(a_RI, b_OR, EMA_RANKS * len(new[a_name]))
    return averaged


def _shortened(a_RI: Tensor, b_OR: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The pair of at most this rank whose product is nearest to BA: its largest singular directions, found without forming it."""
    if len(a_RI) <= rank:
        return a_RI, b_OR
    q_OK, left = torch.linalg.qr(in_float64(b_OR))
    q_IK, right = torch.linalg.qr(in_float64(a_RI).T)
    u, s, v = torch.linalg.svd(left @ right.T, full_matrices=False)
    root = s[:rank].sqrt()
    a, b = root[:, None] * v[:rank] @ q_IK.T, (q_OK @ u[:, :rank]) * root
    return a.to(a_RI), b.to(b_OR)


def in_float64(tensor: Tensor) -> Tensor:
    """Widened, on the CPU where the device (MPS) has no float64."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()

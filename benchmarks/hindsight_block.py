"""How well does the embedded default model act on feedback, by the wording in which the teacher is shown it?

    python -m benchmarks.hindsight_block

Of replies sampled to the prompts and probes of each lesson of `benchmarks/lessons.py`, told its feedback: the share that complies, and the
share that begins with a bracket, as a block in brackets does. `elsewhere` is the share of replies to unrelated questions that "comply", of
lessons that no untold reply complies with: less is better, since what the teacher says there is taught if such a question is imagined. The
first wording is the one in use.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.lessons import LESSONS, UNRELATED
from claas.core.settings import load_settings
from claas.models.default_model import default_model
from claas.training.defaults import default_training
from claas.training.hindsight import HINDSIGHT_BLOCK

SAID = "A later message from the user follows. Use it when answering"
WORDINGS = {
    "in parentheses": HINDSIGHT_BLOCK,
    "in square brackets": f"\n\n[{SAID}: {{feedback}}]",
    "bare": f"\n\n{SAID}: {{feedback}}",
    "in quotes": f'\n\n{SAID}: "{{feedback}}"',
    "after --": f"\n\n--\n{SAID}: {{feedback}}",
    "after --, on two lines": f"\n\n--\n{SAID}.\n{{feedback}}",
}
ELSEWHERE = ("identity", "fact", "tone", "rule")


class Told:
    """The model, told feedback in one wording after the other."""

    def __init__(self, replies: int) -> None:
        folder = default_model(load_settings().cache_dir)
        self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self._replies = replies
        self._sampling = default_training(self._model.num_parameters())

    @torch.no_grad()
    def replies(self, questions: Sequence[str], block: str) -> list[str]:
        """Sampled as hindsight rollouts are."""
        asked = [[{"role": "user", "content": question + block}] for question in questions for _ in range(self._replies)]
        inputs = self._tokenizer.apply_chat_template(asked, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True)
        temperature, tokens = self._sampling.hindsight_temperature, self._sampling.hindsight_max_tokens
        told = self._model.generate(**inputs, do_sample=True, temperature=temperature, top_k=0, max_new_tokens=tokens)
        return [text.strip() for text in self._tokenizer.batch_decode(told[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)]


def judged(told: Told, wording: str) -> dict[str, Any]:
    """The shares of one wording, by lesson and in the mean."""
    complies, brackets, elsewhere = {}, {}, {}
    for lesson in LESSONS:
        block = wording.replace("{feedback}", lesson.feedback)
        replies = told.replies([*lesson.prompts, *lesson.probes], block)
        complies[lesson.name] = statistics.mean(map(lesson.complies, replies))
        brackets[lesson.name] = statistics.mean(reply.startswith(("(", "[")) for reply in replies)
        if lesson.name in ELSEWHERE:
            elsewhere[lesson.name] = statistics.mean(map(lesson.complies, told.replies(UNRELATED, block)))
    shares = {"complies": complies, "begins_with_a_bracket": brackets, "elsewhere": elsewhere}
    return {name: {"mean": statistics.mean(share.values())} | share for name, share in shares.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--replies", type=int, default=8, help="sampled to each question")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/hindsight_block.json"))
    args = parser.parse_args()
    torch.manual_seed(0)
    told = Told(args.replies)
    result: dict[str, Any] = {}
    for name, wording in WORDINGS.items():
        result[name] = {"block": wording} | judged(told, wording)
        print(
            f"{name:24}" + "   ".join(f"{key} {100 * shares['mean']:3.0f} %" for key, shares in result[name].items() if key != "block"),
            flush=True,
        )
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"replies": args.replies, "wordings": result}, indent=2) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()

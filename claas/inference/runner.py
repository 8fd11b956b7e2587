"""Forward passes for serving: prompts in chunks, and one token for every running row. It knows tensors and slots, no requests.

Shape legend
    B  rows   T  tokens of a chunk   L  tokens of the longest row   D  model width   N  positions   V  vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from claas.inference import attention
from claas.inference.kv_slots import KVSlots
from claas.models.base_model import LoadedModel
from claas.models.lora import LoraSwitch, LoraWeights

HEAD_CHUNK = 128


class ModelRunner:
    """A module tree of its own over the base weights, with the rows' adapters and KV cache. For one thread."""

    def __init__(self, model: LoadedModel, max_batch: int, max_context: int) -> None:
        tree = model.tree()
        # On a CPU attention costs what it reads; a GPU would rather have one call.
        tree.set_attn_implementation(attention.NAME if model.device.type == "cpu" else "sdpa")
        self.switch = LoraSwitch(tree)
        self.slots = KVSlots(max_batch, max_context)
        self.device = model.device
        self._dtype = model.dtype
        self._config = model.config
        self._backbone = tree.get_decoder()
        self._head = tree.get_output_embeddings()

    def new_cache(self) -> DynamicCache:
        """An empty cache for `prefill`."""
        return DynamicCache(config=self._config)

    def prefill(self, chunks: Sequence[Sequence[int]], cache: DynamicCache, adapters: Sequence[LoraWeights | None]) -> Tensor:
        """Read one chunk of each row's prompt behind what `cache` holds, (B, T, D). Shorter rows are padded on the right.

        Causal attention never looks to the right, so a row's own positions are exact; what stands behind them means nothing.
        """
        longest = max(len(chunk) for chunk in chunks)
        ids_BT = torch.tensor([[*chunk, *[0] * (longest - len(chunk))] for chunk in chunks], device=self.device)
        self.switch.use(adapters, longest)
        hidden_BTD: Tensor = self._backbone(input_ids=ids_BT, past_key_values=cache, use_cache=True).last_hidden_state
        return hidden_BTD

    def decode(self, last_ids: Sequence[int], adapters: Sequence[LoraWeights | None]) -> Tensor:
        """Feed the last token of every running row; the logits of the next, (B, V)."""
        self.slots.begin_step()
        lengths = self.slots.lengths
        lengths_B = torch.tensor(lengths, device=self.device)
        self.switch.use(adapters, 1)
        by_row = self.device.type == "cpu" and attention.worth_it(lengths)
        hidden_BTD = self._backbone(
            input_ids=torch.tensor(last_ids, device=self.device)[:, None],
            position_ids=lengths_B[:, None],
            attention_mask=None if min(lengths) == max(lengths) else self._mask(lengths_B, max(lengths) + 1),
            past_key_values=self.slots,
            use_cache=True,
            **({"row_lengths": [n + 1 for n in lengths]} if by_row else {}),
        ).last_hidden_state
        self.slots.end_step()
        return self.logits(hidden_BTD[:, -1])

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """The LM head, (N, V)."""
        logits_NV: Tensor = self._head(hidden_ND)
        return logits_NV

    def logprobs(self, hidden_ND: Tensor, targets: Sequence[int]) -> list[float]:
        """The logprob of each target at its position, in nats; in chunks, so that no (N, V) tensor exists for a long text."""
        targets_N = torch.tensor(targets, device=self.device)
        parts = zip(hidden_ND.split(HEAD_CHUNK), targets_N.split(HEAD_CHUNK), strict=True)
        return [p for h, t in parts for p in self.logits(h).float().log_softmax(-1).gather(1, t[:, None]).squeeze(1).tolist()]

    def _mask(self, lengths_B: Tensor, longest: int) -> Tensor:
        """Additive (B, 1, 1, L): a row sees its own tokens and the one being fed."""
        hidden_BL = torch.arange(longest, device=self.device)[None] > lengths_B[:, None]
        return torch.zeros(hidden_BL.shape, dtype=self._dtype, device=self.device).masked_fill_(hidden_BL, float("-inf"))[:, None, None]

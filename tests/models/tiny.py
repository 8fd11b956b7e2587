"""A tiny random Llama with a byte-level tokenizer and a ChatML template: real code paths, milliseconds a token, no download."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from claas.core.types import LoraRuntimeRef
from claas.models.base_model import LoadedModel

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXTS = ("system user assistant\n", "the theory of the thing that there is", "and then the other one came in, naïve as ever: 10 € ☃ 😀")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(chat_template: str = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges, trained on three lines; `<|im_end|>` ends a reply."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=chat_template, model_max_length=512
    )


def save_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Write a whole model folder: random float32 weights, spread wide enough that its logits differ."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, initializer_range=0.2, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_tiny_model(folder: Path, eos_token_ids: Iterable[int] = ()) -> LoadedModel:
    """The model that `save_tiny_model` wrote, on the CPU in float32; `eos_token_ids` end a reply too."""
    module = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    module.generation_config.eos_token_id = [tokenizer.eos_token_id, *eos_token_ids]
    return LoadedModel(
        id="tiny", path=folder, config=module.config, tokenizer=tokenizer, module=module, device=torch.device("cpu"), dtype=torch.float32
    )


def write_adapter(
    folder: Path, model: LoadedModel, *, seed: int, rank: int = 4, alpha: int = 8, targets: Iterable[str] = TARGETS, scale: float = 0.3
) -> Path:
    """PEFT's two files with random A and B that change the model's replies."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    wanted = set(targets)
    for name, module in model.module.named_modules():
        if name.rpartition(".")[2] in wanted:
            for half, shape in (("A", (rank, module.in_features)), ("B", (module.out_features, rank))):
                tensors[f"base_model.model.{name}.lora_{half}.weight"] = torch.randn(shape, generator=generator) * scale
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(wanted),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def adapter_ref(folder: Path, model: LoadedModel, *, seed: int, lora_id: str = "me/a", version: int = 1, **how: object) -> LoraRuntimeRef:
    """`write_adapter` under `folder`, and the reference a serving engine gets of it: other weights have another name."""
    name = f"claas-{lora_id.replace('/', '~')}-v{version}"
    path = write_adapter(folder / name, model, seed=seed, **how)  # type: ignore[arg-type]
    return LoraRuntimeRef(lora_id=lora_id, version=version, vllm_name=f"{name}-{seed:x}", lora_path=str(path))

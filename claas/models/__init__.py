"""The base model that trainer and server share: where it comes from, how it is loaded, its chat template, its LoRA layers."""

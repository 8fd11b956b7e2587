"""Serving: tokens out of a base model and an adapter version. Knows nothing of feedback or training."""

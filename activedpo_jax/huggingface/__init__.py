"""Hugging Face in and out: configs, weights, adapters, merged checkpoints."""

"""Hugging Face safetensors checkpoints, tensor by tensor. No JAX."""

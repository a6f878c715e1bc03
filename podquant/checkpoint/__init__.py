"""Hugging Face safetensors checkpoints, tensor by tensor, and what config.json says of their quantization. No JAX."""

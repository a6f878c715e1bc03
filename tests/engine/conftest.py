"""Tokenizers for the engine's tests."""

from __future__ import annotations

from tests.tokenizer.conftest import any_tokenizer, byte_fallback_tokenizer, byte_level_tokenizer

__all__ = ["any_tokenizer", "byte_fallback_tokenizer", "byte_level_tokenizer"]

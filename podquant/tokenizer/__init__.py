"""From text to token ids and back, as checkpoints ship it, and the chat templates beside it.

The only home of tokenizers, tiktoken and sentencepiece. Knows nothing of models, engines or HTTP.
"""

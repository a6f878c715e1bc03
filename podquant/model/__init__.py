"""Decoder models as Flax NNX modules that compute on one shard of a mesh."""

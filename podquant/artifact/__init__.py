"""The directory that conversion writes and serving reads: its format, manifest, reader, checks and exports.

The only room where the two halves meet. No JAX; never imports `convert`, `weights` or anything above.
"""

"""What models are: config.json, names on disk, one declaration a family, and the registry of them.

No JAX, no files, no rules: both halves import this room, and what they both have to decide (is it tied, is this module
a routed expert or a router, which architectures run) is decided here, once.
"""

"""The decoder's computation on one shard of a mesh, as Flax NNX modules, and how its arrays lie on the mesh.

Knows nothing of files, requests or pages' owners: what a model is comes from `families`.
"""

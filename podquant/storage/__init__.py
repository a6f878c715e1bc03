"""Bytes at a place: stores to read, publications to write, locks and records, whatever the kind of storage.

`places` and `store` choose among `local`, `gcs` and `hub`. Knows nothing of tensors or artifacts.
"""

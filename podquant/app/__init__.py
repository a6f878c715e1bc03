"""Use cases, each a function: convert, serve, quantize and serve, with their progress, reports and signals.

`cli` and `jobs` parse and call these; nothing below imports this room.
"""

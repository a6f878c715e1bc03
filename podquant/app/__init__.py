"""Use cases, each a function: convert, plan, serve, quantize and serve, and what is done with an artifact.

With them what a user sees of work in progress: reports, progress, signals, exit statuses. `cli` and `jobs` parse and
call these; nothing below imports this room.
"""

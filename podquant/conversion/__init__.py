"""From a checkpoint to an artifact: plan, units of work, receipts, commit.

Never imports `model`, `weights`, the engine or the server; the hosts to work on are handed in.
"""

"""Requests to tokens: schedule, pack, step, sample, deliver, on the devices of one mesh.

No HTTP, no processes: `group` and `server` stand above.
"""

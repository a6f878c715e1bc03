"""The engine: load, schedule, step, sample."""

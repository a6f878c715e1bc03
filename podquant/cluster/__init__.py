"""Runs functions on hosts, and knows what TPU hosts there are. Knows nothing of checkpoints, artifacts or models."""

import os

# Must come before any module here imports ray: where podquant was started by `uv run`, Ray would start every worker
# with it too, in a copy of the working directory and an environment that each host builds first. Hosts have podquant.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

"""Runs functions on hosts, and knows what TPU hosts there are. Knows nothing of checkpoints, artifacts or models."""

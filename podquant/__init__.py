"""podquant: quantize a checkpoint on the pod that will serve it, then serve it."""

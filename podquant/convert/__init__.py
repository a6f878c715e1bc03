"""From a checkpoint to an artifact. Never imports the model, the runtime or the server."""

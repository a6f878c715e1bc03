"""Several processes that serve one model: how they find each other, step together, are watched, and start anew."""

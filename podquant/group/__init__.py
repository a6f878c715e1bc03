"""Several processes that serve one model: how they meet, step together, are watched and restart. No HTTP."""

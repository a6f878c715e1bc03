"""The directory that conversion writes and serving reads."""

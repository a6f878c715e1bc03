"""HTTP over an engine or over groups; the only home of FastAPI and pydantic."""

"""How a place is named: the schemes of URIs that podquant reads and writes."""

from __future__ import annotations

SCHEME_GCS = "gs://"
SCHEME_HUB = "hf://"

"""Hugging Face ids: which files of a model matter, why a model is unavailable, and its download.

Knows nothing of what is in it. `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` mean what they mean to huggingface_hub.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from podquant.errors import StorageError

_ID = re.compile(r"[\w.-]+/[\w.-]+")
FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "*.py",
    "*.md",
    "*.png",
    "*.jpg",
    "*.jpeg",
    "*.svg",
    "*.webp",
    "*.gif",
    "LICENSE*",
    "LICENCE*",
    "COPYING*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Weights, configuration, tokenizer, and what goes along with a model. A `*` matches a `/` too."""

NOT_CACHED = "NotCached"
UNREACHABLE = "Unreachable"
REASONS = {
    "GatedRepo": "it needs access: accept its terms on huggingface.co and set HF_TOKEN.",
    "RepoNotFound": "it is not found: check the name, or set HF_TOKEN if it is private.",
    "RevisionNotFound": "it has no revision {revision!r}: check --revision.",
    NOT_CACHED: "it is not in the cache and cannot be downloaded: check the connection and HF_HUB_OFFLINE.",
    UNREACHABLE: "it cannot be reached: {why}. Check the connection and HF_ENDPOINT; with HF_HUB_OFFLINE=1 it is read "
    "from the cache.",
}
"""By the hub's code in the header `X-Error-Code`, and two of ours."""

_CODES = {
    GatedRepoError: "GatedRepo",  # before the error of which it is a kind
    RepositoryNotFoundError: "RepoNotFound",
    RevisionNotFoundError: "RevisionNotFound",
    LocalEntryNotFoundError: NOT_CACHED,
}


@dataclass(frozen=True)
class Snapshot:
    """A downloaded checkpoint: its local directory, and `org/name@commit`."""

    path: str
    name: str


def download_model(model: str, *, revision: str | None = None, directory: str | None = None) -> Snapshot:
    """Download weights, configuration and tokenizer of a model, or find them in the cache.

    Args:
        model: `org/name`.
        revision: branch, tag or commit; the main branch if None.
        directory: the cache to use instead of huggingface_hub's own.

    Raises:
        StorageError: no such local directory and no such model, no access, or no connection.
    """
    check_id(model)
    try:
        path = snapshot_download(model, revision=revision, cache_dir=directory, allow_patterns=list(FILES))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), "")
        raise refusal(model, revision, code, str(error)) from error
    return Snapshot(path, f"{model}@{path.rstrip('/').rpartition('/')[2]}")


def check_id(model: str) -> None:
    """`StorageError` unless `model` has the form `org/name`."""
    if not _ID.fullmatch(model):
        raise StorageError(
            f"{model}: no such directory, and not a Hugging Face id (org/name) either. Check the path or the id."
        )


def refusal(model: str, revision: str | None, code: str, why: str = "") -> StorageError:
    """The error for a model that is unavailable; `why` is included where `code` is not one of `REASONS`."""
    reason = REASONS.get(code, "it could not be downloaded: {why}").format(revision=revision, why=why)
    return StorageError(f"{model}: no such directory, and as a Hugging Face id {reason}")


def is_offline() -> bool:
    """Whether the user has set HF_HUB_OFFLINE: only what is in the cache may be used."""
    return bool(HF_HUB_OFFLINE)

"""Downloads the checkpoint of a Hugging Face id. Knows nothing of what is in it.

`HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` mean what they mean to huggingface_hub.
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
_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "LICENSE*",
    "NOTICE*",
)


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
    if not _ID.fullmatch(model):
        raise StorageError(
            f"{model}: no such directory, and not a Hugging Face id (org/name) either. Check the path or the id."
        )
    what = f"{model}: no such directory, and as a Hugging Face id"
    try:
        path = snapshot_download(model, revision=revision, cache_dir=directory, allow_patterns=list(_FILES))
    except GatedRepoError as error:
        raise StorageError(f"{what} it needs access: accept its terms on huggingface.co and set HF_TOKEN.") from error
    except RepositoryNotFoundError as error:
        raise StorageError(f"{what} it is not found: check the name, or set HF_TOKEN if it is private.") from error
    except RevisionNotFoundError as error:
        raise StorageError(f"{what} it has no revision {revision!r}: check --revision.") from error
    except LocalEntryNotFoundError as error:
        raise StorageError(
            f"{what} it is not in the cache and cannot be downloaded: check the connection and HF_HUB_OFFLINE."
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise StorageError(f"{what} it could not be downloaded: {error}") from error
    return Snapshot(path, f"{model}@{path.rstrip('/').rpartition('/')[2]}")


def is_offline() -> bool:
    """Whether the user has set HF_HUB_OFFLINE: only what is in the cache may be used."""
    return bool(HF_HUB_OFFLINE)

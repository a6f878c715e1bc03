"""Every error podquant raises on purpose. A message says what, where, expected, got, and what to do.

PodquantError
├── ConfigError               YAML, flags: carries file:line
├── StorageError              bytes could not be read or written (disk full, permission, missing file)
│   └── TransientStorageError the same, but trying the whole piece of work again may help
├── CheckpointError           a source that is not a valid Hugging Face safetensors checkpoint
│   └── UnsupportedModelError a valid checkpoint podquant cannot run, refused by name
├── NonFiniteWeightError      NaN or Inf in a weight
├── ArtifactError             an artifact that breaks FORMAT.md
│   └── ArtifactExistsError   the place to write to is taken
├── MeshError                 a model and a device mesh that do not fit
├── CapacityError             the device memory asked for does not suffice
├── ClusterError              hosts that cannot be reached, do not answer, or die one after another
└── RequestError              a request the engine refuses (HTTP 400)
    ├── RequestTooLongError   longer than the context or the KV cache (HTTP 400)
    ├── QueueFullError        too many waiting (HTTP 429)
    └── EngineStoppedError    the engine cannot serve now (HTTP 503)
"""

from __future__ import annotations


class PodquantError(Exception):
    """Base of every error raised on purpose; the CLI prints its text without a traceback."""


class ConfigError(PodquantError):
    """A configuration file or flag is wrong."""


class StorageError(PodquantError):
    """Bytes at a location could not be read or written."""


class TransientStorageError(StorageError):
    """A store that was out of reach for long, or did not keep what it was sent: another try may succeed."""


class CheckpointError(PodquantError):
    """A source is not a valid Hugging Face safetensors checkpoint."""


class UnsupportedModelError(CheckpointError):
    """A valid checkpoint whose architecture, option or quantization podquant cannot run."""


class NonFiniteWeightError(PodquantError):
    """A weight holds NaN or Inf; names the tensor, the row and the file."""


class ArtifactError(PodquantError):
    """An artifact breaks the rules of `podquant/artifact/FORMAT.md`."""


class ArtifactExistsError(ArtifactError):
    """The place to write an artifact to is already taken."""


class MeshError(PodquantError):
    """A model cannot be laid out over the devices asked for."""


class CapacityError(PodquantError):
    """The memory of the devices does not suffice for what was asked."""


class ClusterError(PodquantError):
    """A cluster, or the hosts it should have, cannot be reached or cannot do the work."""


class RequestError(PodquantError):
    """A request that the engine refuses before it runs.

    `param` names the offending field, as in OpenAI's error body.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class RequestTooLongError(RequestError):
    """A prompt, or a prompt with its `max_tokens`, that exceeds the context length or the KV cache."""


class QueueFullError(RequestError):
    """More requests are waiting than the server allows."""


class EngineStoppedError(RequestError):
    """The engine has stopped, or has failed, and takes no requests."""


def error_named(name: str) -> type[PodquantError] | None:
    """The class of this name, for errors that come from another process; None if there is none."""
    found = globals().get(name)
    return found if isinstance(found, type) and issubclass(found, PodquantError) else None

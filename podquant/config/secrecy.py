"""Which settings are secrets, by their names and values: no job file holds one, and none is sent through Ray.

Ray writes the environment of a job and of its workers, and the job's files, to disk on every host as they are.
"""

from __future__ import annotations

import re

_WORDS = frozenset(
    {"TOKEN", "SECRET", "SECRETS", "KEY", "KEYS", "APIKEY", "PASSWORD", "PASSWORDS", "PASSWD", "PASSPHRASE"}
    | {"CREDENTIAL", "CREDENTIALS", "CRED", "CREDS", "AUTHORIZATION", "BEARER", "COOKIE"}
)
_PLACES = ("_PATH", "_FILE", "_DIR")
_PATHS = frozenset({"GOOGLE_APPLICATION_CREDENTIALS"})
_SWITCHES = frozenset({"", "0", "1", "true", "false", "yes", "no", "on", "off"})
_GCSFS_METHODS = frozenset({"anon", "cloud", "cache", "google_default"})
_LOGIN_IN_URL = re.compile(r"://[^/\s@]+@")

INSTEAD = (
    "set it in the environment in which Ray is started on each host (in Kubernetes, from a Secret), or name a file "
    "there, as HF_TOKEN_PATH and serve.api_key_file do"
)
"""Where a secret belongs that hosts of a cluster need."""


def is_secret(name: str, value: str) -> bool:
    """Whether a variable or a key of this name holds a secret, so far as name and value tell.

    A word of the name says so (`HF_TOKEN`, `AWS_SECRET_ACCESS_KEY`, `api_key`), unless it names a file
    (`HF_TOKEN_PATH`, `GOOGLE_APPLICATION_CREDENTIALS`) or the value is a switch or one of gcsfs's words for where
    credentials are found (`HF_HUB_DISABLE_IMPLICIT_TOKEN=1`, `FSSPEC_GCS_TOKEN=anon`). A URL with a login in it is one.
    """
    upper = name.upper()
    if _LOGIN_IN_URL.search(value):
        return True
    if upper in _PATHS or upper.endswith(_PLACES) or value.lower() in _SWITCHES | _GCSFS_METHODS:
        return False
    return not _WORDS.isdisjoint(re.split("[^A-Z]+", upper))

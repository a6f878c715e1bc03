"""Finds a configuration file by its path, or by the bare name of one that podquant ships. Does not open it."""

from __future__ import annotations

import os
from pathlib import Path

from podquant.config.yamlfile import nearest
from podquant.errors import ConfigError
from podquant.foreign import cut, shown

_PACKAGE = Path(__file__).resolve().parent.parent
_SHIPPED = (_PACKAGE / "configs", _PACKAGE.parent / "configs")  # in a wheel; in a checkout


def find_config(path_or_bare_name: str, *, what: str, folder: str = "") -> Path:
    """The file at a path; for a bare name (`int8.yaml`) that is not in the working directory, the shipped one.

    Args:
        path_or_bare_name: as the user wrote it.
        what: the kind of file, for the message.
        folder: of `configs/`, where the shipped files of this kind are.

    Raises:
        ConfigError: there is no such file; says where it was looked for and which ones ship.
    """
    given = Path(path_or_bare_name)
    folders = [directory / folder for directory in _SHIPPED]
    candidates = [given, *(directory / given for directory in folders if given.name == path_or_bare_name)]
    for path in candidates:
        if os.path.isfile(path):  # unlike `Path.is_file`, false for a name that no file can have
            return path
    shipped = sorted({path.name for directory in folders for path in directory.glob("*.yaml")})
    tried = ", ".join(cut(str(path), 400) for path in candidates)
    raise ConfigError(
        f"{shown(path_or_bare_name, 400)}: no such {what}; looked for {tried}; "
        f"expected a path, or one of the shipped files {', '.join(shipped)}{nearest(given.name, shipped)}"
    )

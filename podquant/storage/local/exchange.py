"""Swaps two directories of one file system, atomically where the system can.

Knows nothing of what they hold.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h
_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP})


def exchange(first: Path, second: Path) -> bool:
    """Swap the names of two directories by one call of the kernel (renameat2(2)); raises OSError.

    Returns:
        Whether it was done; False, and nothing is changed, where the file system (NFS, FUSE) or the system has no such
        call.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(second))

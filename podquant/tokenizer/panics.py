"""What libraries in Rust and C++ raise over files and texts that they cannot deal with. Knows nothing of either.

A panic of Rust code arrives as an exception that is no `Exception`, and passes every handler of those.
"""

from __future__ import annotations

from podquant.foreign import cut


def reason(error: BaseException) -> str:
    """Why a library failed, for a message; raises `error` itself if it is no failure, but a signal or an exit."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return cut((str(error) or type(error).__name__).rstrip("."), 200)

"""Work that may take long leaves the event loop for a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

_MANY = 4096


async def off_loop[T](length: int, work: Callable[[], T]) -> T:
    """What `work` gives on so many characters or tokens, without holding up the event loop if they are many."""
    return work() if length < _MANY else await asyncio.to_thread(work)

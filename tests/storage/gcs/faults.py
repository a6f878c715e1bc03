"""What can be made to go wrong in the emulator of Cloud Storage, and its account of a request."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Fault:
    """What to do to the next requests whose "METHOD /path?query" matches `request`.

    kind: `status` (refuse with `status`), `reset` (drop the connection before answering; a body is read up to
        `after` bytes, and an upload keeps those), `stall` (stop sending after `after` bytes, for `seconds`),
        `truncate` (end the body after `after` bytes), `lost` (do it, and drop the connection), `wrong_crc` (report a
        wrong CRC32C), `corrupt` (flip a bit of what is sent or stored), `short` (an upload keeps only `after` bytes of
        a chunk, and says so).
    """

    kind: str
    request: str = "."
    times: int = 1
    skip: int = 0
    status: int = 503
    after: int = 0
    seconds: float = 3600.0
    message: str = "injected"
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Record:
    """One request: what was asked, what was answered, and the bytes of the bodies."""

    request: str
    status: int = 0
    bytes_in: int = 0
    bytes_out: int = 0

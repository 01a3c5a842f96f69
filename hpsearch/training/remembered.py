"""What one process keeps at hand of what it made: asking the driver for it costs a journey."""

from __future__ import annotations

from collections import OrderedDict


class Remembered:
    """The most recent blobs, as many as fit."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._n_bytes = 0
        self._blobs: OrderedDict[str, bytes] = OrderedDict()

    def put(self, ref: str, content: bytes) -> None:
        """Keep a blob; those that were put or asked for the longest ago make room, or this one if it is too large."""
        self._n_bytes += len(content) - len(self._blobs.pop(ref, b""))
        self._blobs[ref] = content
        while self._n_bytes > self._max_bytes:
            _, dropped = self._blobs.popitem(last=False)
            self._n_bytes -= len(dropped)

    def clear(self) -> None:
        self._blobs.clear()
        self._n_bytes = 0

    def get(self, ref: str) -> bytes | None:
        content = self._blobs.get(ref)
        if content is not None:
            self._blobs.move_to_end(ref)
        return content

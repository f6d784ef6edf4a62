"""Send a request to a server and read its reply: at most so many bytes, and from no other address.

`endpoint.py` gives this client to the SDK of OpenAI.
"""

from __future__ import annotations

import asyncio
import zlib
from contextlib import suppress
from typing import Any

import httpx2
import openai

PIECE = 1 << 20  # bytes that are unpacked at a time; the time limit is checked between two pieces (our choice)
WORDS = 1 << 16  # most bytes that are read of an error; its status matters more (our choice)
KEPT = (b"location", b"retry-after")  # headers that are read; no charset: JSON is UTF-8 (RFC 8259, section 8.1)


class UnreadError(Exception):
    """A reply could not be read to its end. `again` says whether another attempt may succeed."""

    def __init__(self, reason: str, again: bool = False) -> None:
        super().__init__(reason)
        self.again = again


class Client(openai.DefaultAsyncHttpxClient):
    """Send the requests of `openai.AsyncOpenAI`, without redirects and with a limit on the size of replies.

    The SDK's own client follows redirects to any address, with the images and questions of the request, and unpacks a
    reply of any size.

    Args:
        limit: Most bytes of a reply, packed and unpacked.
    """

    def __init__(self, limit: int) -> None:
        # only gzip is accepted: the standard library can unpack it piece by piece
        super().__init__(timeout=None, follow_redirects=False, headers={"Accept-Encoding": "gzip"})
        self.limit = limit

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Return the reply, read whole; of an error, its first `WORDS` bytes.

        Raises:
            UnreadError: It is larger than the limit, or cannot be unpacked.
        """
        options |= {"stream": True, "follow_redirects": False}
        response = await super().send(request, **options)
        content = bytearray()
        try:
            if response.is_success:
                await _read(response, content, self.limit)
            else:
                with suppress(UnreadError):
                    await _read(response, content, WORDS)
                del content[WORDS:]
        finally:
            await response.aclose()
        headers = [(name, response.headers.get(name.decode(), "").encode()) for name in KEPT]
        return httpx2.Response(response.status_code, headers=headers, content=bytes(content), request=request)


async def _read(response: httpx2.Response, content: bytearray, limit: int) -> None:
    """Append the body to `content`, which gets at most `PIECE` bytes more than the limit."""
    packing = response.headers.get("content-encoding", "").strip().lower()
    if packing not in ("", "identity", "gzip", "x-gzip"):
        raise UnreadError(f"its reply is packed as {packing!r}, and only gzip was asked for")
    unpacker = zlib.decompressobj(wbits=31) if "gzip" in packing else None  # 31: with the header of gzip
    came = 0
    async for raw in response.aiter_raw():
        came += len(raw)
        if unpacker is None:
            content += raw
        while unpacker is not None and raw and not unpacker.eof and len(content) <= limit:
            try:
                content += unpacker.decompress(raw, PIECE)
            except zlib.error:
                raise UnreadError("its reply says that it is gzip and is not", again=True) from None
            raw = unpacker.unconsumed_tail
            await asyncio.sleep(0)
        if max(came, len(content)) > limit:
            raise UnreadError(f"its reply is larger than {limit / 2**20:g} MiB")
    if unpacker is not None and came and not unpacker.eof:
        raise UnreadError("its reply breaks off in the middle of its gzip", again=True)

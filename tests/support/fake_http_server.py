"""A server in miniature, `fake_http_server.py PORT [fail]`: /health, and a stream of tokens or status 503."""

from __future__ import annotations

import asyncio
import json
import sys


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = head.partition("content-length: ")[2].split()
    body = await reader.readexactly(int(length[0]) if length else 0)
    if head.startswith("get /health"):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    elif "fail" in sys.argv:
        writer.write(b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nfull")
    else:
        await _stream(writer, json.loads(body))
    await writer.drain()
    writer.close()


async def _stream(writer: asyncio.StreamWriter, request: dict[str, int]) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    events = [f'data: {{"tokens": [{7 + k}]}}\n\n' for k in range(request["count"])]
    text = "".join([*events, 'data: {"tokens": []}\n\n', "data: [DONE]\n\n"]).encode()
    for start in range(0, len(text), 11):  # an event may begin in one chunk and end in the next
        part = text[start : start + 11]
        writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
    writer.write(b"0\r\n\r\n")


async def main() -> None:
    server = await asyncio.start_server(answer, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())

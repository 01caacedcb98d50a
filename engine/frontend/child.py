"""Processes that the front end starts, each on a Unix socket that nobody else can reach: what is common to them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

from cierzo.engine import signs

MAX_BASE_CHARS = 64  # of the folder for temporary files: a socket's path may have 107
MAX_CHILD_FRAME_BYTES = 1 << 30  # our own process: the bound only tells a frame from garbage


class Child(Protocol):
    """The part of `asyncio.subprocess.Process` that is used of one."""

    @property
    def pid(self) -> int:
        """The process's number."""
        ...

    async def wait(self) -> int:
        """Wait for its end; the exit status."""
        ...

    def kill(self) -> None:
        """End it at once; ProcessLookupError if it has ended."""
        ...


Spawn = Callable[[str], Awaitable[Child]]  # path of the socket -> a process that connects to it


async def spawn_module(module: str, socket_path: str) -> Child:
    """A Python module as a process, in a session of its own: a Ctrl-C in the terminal is for the front end."""
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, "--socket", socket_path, start_new_session=True
    )


@contextlib.asynccontextmanager
async def private_socket(name: str, protocol: asyncio.Protocol) -> AsyncIterator[str]:
    """A socket, by its path, on which `protocol` awaits a connection. Its folder goes as soon as there is one."""
    base = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix=f"cierzo-{name}-", dir=base if len(base) <= MAX_BASE_CHARS else "/tmp")  # 0700

    def remove() -> None:
        """Remove the folder, also when there is no descriptor left to list it with."""
        shutil.rmtree(folder, ignore_errors=True)
        for left in (f"{name}.sock", signs.NAME, ""):
            with contextlib.suppress(OSError):
                (os.unlink if left else os.rmdir)(os.path.join(folder, left))

    def accepted() -> asyncio.Protocol:
        remove()
        return protocol

    try:
        path = os.path.join(folder, f"{name}.sock")
        listener = await asyncio.get_running_loop().create_unix_server(accepted, path)
        try:
            os.chmod(path, 0o600)
            yield path
        finally:
            listener.close()
    finally:
        remove()


async def wait_for_news(child: Child, news: set[asyncio.Future[Any]], timeout_s: float) -> bool:
    """Wait for the first of `news`, or the end of the process, at most `timeout_s`; whether it has ended."""
    ended = asyncio.ensure_future(child.wait())
    try:
        await asyncio.wait({ended, *news}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        return ended.done()
    finally:
        ended.cancel()
        await asyncio.gather(ended, return_exceptions=True)


async def kill(child: Child) -> None:
    """End a process, if it has not ended, and leave no zombie of it."""
    with contextlib.suppress(ProcessLookupError):
        child.kill()
    await child.wait()

"""The front end of a fake server: the real one, with connections that can be cut and a state that can be chosen."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import cast

from cierzo.engine.errors import CierzoError, CoreFailed
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.frames import Buffer
from cierzo.engine.frontend.frontend import Frontend
from cierzo.engine.frontend.rpc import Connection, RpcServer
from cierzo.engine.frontend.stream import Sink
from cierzo.engine.messages import Accepted, Delta, Final, Generate, Message, ModelInfo
from cierzo.engine.testing.local_encoders import local_encoders
from cierzo.engine.testing.paced_core import PacedCore
from cierzo.engine.testing.script import Script, ScriptedPrompts

STATES = ("loading", "ready", "stalled", "draining", "failed")


class CuttableConnection(Connection):
    """Ends behind so many deltas of a stream, if it is told to."""

    def __init__(self, server: RpcServer) -> None:
        super().__init__(server)
        self.deltas_left: dict[int, int] = {}  # by stream
        self._is_cut = False

    def put(self, message: Message) -> None:
        """Send a message, unless the connection was cut before it."""
        if isinstance(message, Final) and message.stream in self.deltas_left:
            self.cut()  # fewer deltas have come than it was to end behind: it ends before the last record
        if self._is_cut:
            return
        super().put(message)
        if isinstance(message, Accepted | Delta) and message.stream in self.deltas_left:
            self.deltas_left[message.stream] -= isinstance(message, Delta)
            if self.deltas_left[message.stream] <= 0:
                self.cut()

    def put_frame(self, pieces: Iterator[Buffer]) -> None:
        """Send a long last record, unless the connection is to be cut before one."""
        if any(left > 0 for left in self.deltas_left.values()):
            self.cut()
        if not self._is_cut:
            super().put_frame(pieces)

    def cut(self) -> None:
        """End behind what was put, once whoever puts it is done."""
        if not self._is_cut:
            self._is_cut = True
            asyncio.get_running_loop().call_soon(self.finish)


class CuttableServer(RpcServer):
    """Makes such connections."""

    @property
    def connections(self) -> list[CuttableConnection]:
        """The connections that are open."""
        return cast("list[CuttableConnection]", [*self._connections])

    def _connection(self) -> CuttableConnection:
        return CuttableConnection(self)


class ResettingFrontend(Frontend):
    """Tells a connection when it is to end."""

    script: Script

    def generate(self, sink: Sink, message: Generate) -> None:
        """Accept a request, whose connection may be cut."""
        with self._reset(sink, message.stream):
            super().generate(sink, message)

    def generate_large(self, sink: Sink, stream_id: int, body: bytearray, deadline_s: float | None) -> None:
        """Accept a long request, whose connection may be cut."""
        with self._reset(sink, stream_id):
            super().generate_large(sink, stream_id, body, deadline_s)

    @contextlib.contextmanager
    def _reset(self, sink: Sink, stream_id: int) -> Iterator[None]:
        """Follow the next order to cut a connection; one that is refused leaves it to the next request."""
        resets = self.script.resets
        if not resets or not isinstance(sink, CuttableConnection):
            yield
            return
        after_deltas = sink.deltas_left[stream_id] = resets.popleft()
        try:
            yield
        except CierzoError:
            del sink.deltas_left[stream_id]
            resets.appendleft(after_deltas)
            raise
        if not after_deltas and "resume" not in sink.features:  # there is no `accepted` to wait for
            sink.cut()


class House:
    """Front end, server and core in one of their lives. `open` it, `close` it."""

    def __init__(self, config: FrontendConfig, model: ModelInfo, prompts: ScriptedPrompts, core: PacedCore) -> None:
        self._core = core
        self.frontend = ResettingFrontend(config, model, prompts, core, local_encoders(prompts, config, model))
        self.frontend.script = prompts.script
        self.server = CuttableServer(config, self.frontend)

    async def open(self) -> None:
        """Listen, and take requests. Raises ConfigError."""
        await self.server.start()
        self._core.start(self.frontend.core)
        self.frontend.core.ready()

    async def close(self) -> None:
        """End at once, whatever is open."""
        for connection in self.server.connections:
            connection.drop()
        await self.server.close()
        await self.frontend.close()
        self._core.stop()

    def become(self, state: str) -> None:
        """Have another state of health, in the way in which a server gets there."""
        core = self.frontend.core
        if state == self.frontend.health:
            return
        if self.frontend.health == "draining":
            self.frontend.undo_drain()
        if core.state == "stalled":
            self._core.is_held = False
            core.stalled(False)
            self._core.go_on()
        elif core.state != "ready":
            core.ready()
        if state == "loading":
            self._core.forget()
            core.lost(committed=True)
        elif state == "stalled":
            self._core.is_held = True
            self._core.go_on()
            core.stalled(True)
        elif state == "draining":
            self.frontend.drain()
        elif state == "failed":
            self._core.forget()
            core.failed(CoreFailed("the fake server has failed, as it was told"))

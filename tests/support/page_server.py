"""Server for the page's tests: the files as they are sent, a state that the test sets, answers that it wrote."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import contextmanager
from typing import Any

import msgspec
import uvicorn
from browser import Browser
from selenium.webdriver.common.keys import Keys
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from cierzo.engine.gateway.guard import ALWAYS
from cierzo.engine.gateway.site import assets
from cierzo.engine.gateway.state import Latency, PageState, TenantSums

Event = dict[str, Any] | str | threading.Event  # what is sent; one that is waited for


def figures(**changed: Any) -> PageState:
    """A state of a server that is busy."""
    counts = [0, 0, 0, 40, 900, 60] + [0] * 11
    state = PageState(
        model="small-4",
        model_id="small-4-id",
        version="0.1.0",
        device="cpu",
        dtype="bfloat16",
        max_model_len=32768,
        state="ready",
        notes=[],
        uptime_s=100.0,
        running=6,
        waiting=2,
        streams=8,
        connections=3,
        kv_used_share=0.42,
        kv_cached_share=0.2,
        prompt_tokens=10_000,
        output_tokens=2_000,
        accepted=120,
        refused=4,
        finished=108,
        preemptions=1,
        restarts=0,
        efforts=["none", "low", "high"],
        marks_thinking=True,
        marks_calls=True,
        sees=True,
        latency_bounds_s=[
            *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
            *(1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0),
        ],
        first_token_s=Latency(0.2, 0.4, 0.5, [0] * 7 + [50, 50, 8] + [0] * 7),
        inter_token_s=Latency(0.014, 0.019, 0.03, counts),
        tenants=[TenantSums("default", 80, 9_000, 1_500), TenantSums("search", 28, 1_000, 500)],
    )
    return msgspec.structs.replace(state, **changed)


def chunk(finish: str | None = None, usage: dict[str, int] | None = None, **delta: Any) -> dict[str, Any]:
    """A chunk of a streamed chat completion."""
    choices = [] if usage else [{"index": 0, "delta": delta, "finish_reason": finish}]
    return {"object": "chat.completion.chunk", "model": "small-4-id", "choices": choices, "usage": usage}


def said(text: str, finish: str = "stop") -> list[Event]:
    """A whole answer, a word at a time."""
    words = [chunk(content=word) for word in text.replace(" ", " \0").split("\0")]
    usage = {"prompt_tokens": 9, "completion_tokens": len(words), "total_tokens": 9 + len(words)}
    return [*words, chunk(finish=finish), chunk(usage=usage), "[DONE]"]


class PageServer:
    """Answers that the server will give, and questions that it was asked.

    state: what is told of it, or what makes that. status: of the answers about it. key: wanted, if there is one.
    answers: to come for chat completions, as events or as a response. asked: bodies of these. gone: set once the
    reader of a stream left early.
    """

    def __init__(self) -> None:
        self.state: PageState | Callable[[], PageState] = figures()
        self.status = 200
        self.key = ""
        self.answers: list[Iterable[Event] | Response] = []
        self.asked: list[dict[str, Any]] = []
        self.num_states = 0
        self.gone = threading.Event()
        self.url = ""

    def app(self) -> Starlette:
        """The routes."""

        def file(path: str) -> Route:
            asset = assets()[path]
            headers = {name.decode(): value.decode() for name, value in [*ALWAYS, *asset.headers]}
            headers["content-type"] = asset.kind.decode()
            return Route(path, lambda request: Response(asset.body, headers=headers))

        return Starlette(
            routes=[
                *map(file, assets()),
                Route("/page/state", self._state),
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ]
        )

    async def _state(self, request: Request) -> Response:
        self.num_states += 1
        if refused := self._refusal(request):
            return refused
        if self.status != 200:
            return JSONResponse({"error": {"message": "no"}}, self.status)
        state = self.state if isinstance(self.state, PageState) else self.state()
        return Response(msgspec.json.encode(state), media_type="application/json")

    async def _models(self, request: Request) -> Response:
        return self._refusal(request) or JSONResponse({"object": "list", "data": [{"id": "small-4-id"}]})

    async def _chat(self, request: Request) -> Response:
        if refused := self._refusal(request):
            return refused
        assert request.headers["content-type"] == "application/json"
        self.asked.append(await request.json())
        answer = self.answers.pop(0)
        if isinstance(answer, Response):
            return answer
        return StreamingResponse(self._sent(answer), media_type="text/event-stream")

    async def _sent(self, events: Iterable[Event]) -> AsyncIterator[str]:
        try:
            for event in events:
                if isinstance(event, threading.Event):
                    while not event.is_set():
                        await asyncio.sleep(0.01)
                elif isinstance(event, str):
                    yield f"data: {event}\n\n"
                else:
                    yield f"data: {json.dumps(event)}\n\n"
        except asyncio.CancelledError:
            self.gone.set()
            raise

    def _refusal(self, request: Request) -> Response | None:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "a key is needed"}}, 401)
        return None


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listens = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listens.set()


@contextmanager
def page_server():
    """Run one in a thread of its own."""
    page = PageServer()
    config = uvicorn.Config(page.app(), host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=1)
    server = _Server(config)

    def serve() -> None:
        with config.bind_socket() as sock:
            page.url = f"http://127.0.0.1:{sock.getsockname()[1]}/"
            server.run(sockets=[sock])

    thread = threading.Thread(target=serve)
    thread.start()
    assert server.listens.wait(20)
    try:
        yield page
    finally:
        server.should_exit = True
        thread.join(10)


def ask(window: Browser, text: str) -> None:
    """Ask the page's chat box a question."""
    window.one("#question").send_keys(text, Keys.ENTER)

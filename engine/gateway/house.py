"""Things that all HTTP requests share."""

from __future__ import annotations

import time

import msgspec

from cierzo.engine.errors import CierzoError
from cierzo.engine.frontend.generation import Generation
from cierzo.engine.frontend.pool import Pool
from cierzo.engine.frontend.validate import TRACEPARENT
from cierzo.engine.gateway.asked import Rules, in_body
from cierzo.engine.gateway.backend import Backend, Packing
from cierzo.engine.gateway.bodies import Bodies, Request
from cierzo.engine.gateway.call import Call
from cierzo.engine.gateway.config import HttpConfig
from cierzo.engine.gateway.fetching import Fetching
from cierzo.engine.gateway.reading import Endpoint
from cierzo.engine.gateway.token_words import TokenWords
from cierzo.engine.messages import ModelInfo

MODEL_S = 10.0  # for which a description of the model is taken to be true


class House:
    """Settings, the model that is served and the words of its tokens, and what takes memory: long bodies that come,
    and whole answers that are put together."""

    def __init__(self, config: HttpConfig) -> None:
        self.config = config
        self.began_s = int(time.time())
        self.arriving = Pool("max_arriving_bytes", config.max_arriving_bytes)
        self.fetching = Fetching(config.allow_image_hosts, config.max_fetched_bytes, self.arriving)
        self.joined = Pool("max_joined_bytes", config.max_joined_bytes)
        self._bodies = Bodies()
        self._rules: Rules | None = None
        self._until_s = 0.0
        self._words: dict[bool, TokenWords] = {}

    def close(self) -> None:
        """End what runs on the side."""
        self._bodies.close()

    async def rules(self, backend: Backend) -> Rules:
        """Rules for requests, by the model that is served now."""
        now = time.monotonic()
        if self._rules is None or now >= self._until_s:
            model = await backend.model_info()
            if self._rules is None or self._rules.model != model:
                self._rules, self._words = self._made(model), {}
            self._until_s = now + MODEL_S
        return self._rules

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the model, once its rules are known: the first is the one that is told."""
        assert self._rules is not None
        return tuple(dict.fromkeys((*self._rules.names, self._rules.model.name)))

    def words(self, by_id: bool = False) -> TokenWords:
        """The words of the model's tokens."""
        return self._words.setdefault(by_id, TokenWords(by_id))

    async def requests(self, call: Call, endpoint: Endpoint) -> list[Request]:
        """Read a body: a request for each prompt in it."""
        rules, named = await self.rules(call.engine), {"caller_id": call.request_id}
        if TRACEPARENT.fullmatch(traceparent := call.field(b"traceparent")):
            named["traceparent"] = traceparent
        packs, tenant = isinstance(call.engine, Packing), call.engine.tenant
        found = await self._bodies.read(endpoint, call.body, rules, named, packs=packs, tenant=tenant)
        call.forget(self.arriving)
        call.pass_over(found[0].asked.passed_over)
        return [await self._with_images(request, tenant) for request in found]

    async def _with_images(self, request: Request, tenant: str) -> Request:
        """The request with the images that had to be fetched. Raises InvalidRequest for one that cannot be had."""
        if not (fetches := request.asked.fetches):
            return request
        return msgspec.structs.replace(request, images=tuple(await self.fetching.fetch(fetches, tenant)))

    def _made(self, model: ModelInfo) -> Rules:
        config = self.config
        return Rules(
            model=model,
            names=config.served_model_name,
            lenient=config.lenient,
            max_depth=config.max_body_depth,
            max_prompts=config.max_prompts,
            image_hosts=config.allow_image_hosts,
        )


def ask(backend: Backend, request: Request) -> Generation:
    """Ask the engine. Raises what it refuses at once, in the words of the body."""
    try:
        if request.packed:
            assert isinstance(backend, Packing)
            deadline_s = _seconds(request.arguments.get("deadline_s"))
            return backend.generate_packed(request.packed, deadline_s, request.images)
        if request.images:
            return backend.generate(**{**request.arguments, "images": request.images})
        return backend.generate(**request.arguments)
    except CierzoError as error:
        raise in_body(error, request.asked) from None


def _seconds(given: object) -> float | None:
    return float(given) if isinstance(given, int | float) else None

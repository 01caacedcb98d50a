"""The engine as handlers of HTTP requests see it: in this process (`embedded`), or at the other end of an RPC
connection (`remote`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, Unpack, runtime_checkable

import msgspec

from cierzo.engine.frontend.client_options import GenerateArguments, TokenizeArguments
from cierzo.engine.frontend.frontend import Frontend
from cierzo.engine.frontend.generation import Generation
from cierzo.engine.frontend.tenants import Right
from cierzo.engine.messages import Health, ModelInfo, Stats, TokenizerInfo


class Caller(msgspec.Struct, frozen=True):
    """Evidence that an HTTP request brings of whose it is: the bearer key ("" for none), the name in the client's
    certificate, where it comes from, and whether that is this machine."""

    key: str = ""
    certificate: str = ""
    peer: str = ""
    is_local: bool = False


class Backend(Protocol):
    """The engine, for one HTTP request of one tenant. Whoever has it closes it when the request is over."""

    @property
    def tenant(self) -> str:
        """Whose request it is: what is shared is shared between these."""
        ...

    def generate(self, **arguments: Unpack[GenerateArguments]) -> Generation:
        """Ask for an answer; as `Client.generate`."""
        ...

    async def health(self) -> Health:
        """The state of the engine."""
        ...

    async def stats(self) -> Stats:
        """Counters and gauges of the engine. Raises Forbidden without the right "stats"."""
        ...

    async def model_info(self) -> ModelInfo:
        """Describe the model, and its limits."""
        ...

    async def tokenize(self, **arguments: Unpack[TokenizeArguments]) -> list[int]:
        """Give the tokens of a prompt; as `Client.tokenize`."""
        ...

    async def detokenize(self, token_ids: Iterable[Any], *, control_tokens: bool = False) -> str:
        """Give the text of tokens; as `Client.detokenize`."""
        ...

    async def token_bytes(self, token_ids: Iterable[Any]) -> list[bytes]:
        """Give the bytes of each token, of a control token those of its spelling."""
        ...

    async def tokenizer_info(self) -> TokenizerInfo:
        """Describe the tokenizer. Raises Forbidden without the right "stats"."""
        ...

    async def require(self, right: Right) -> None:
        """Raise Forbidden unless the caller has a right."""
        ...

    def close(self) -> None:
        """The request is over: what still runs of it is cancelled."""
        ...


@runtime_checkable
class Packing(Protocol):
    """A backend that takes messages as they are packed: nobody in this process reads a long one."""

    def generate_packed(self, message: bytes, deadline_s: float | None, images: Sequence[bytes] = ()) -> Generation:
        """Ask for an answer by the MessagePack of a `Generate`. Its stream is the number of such requests so far at
        this backend, from 1. deadline_s: what it says of that; images: files for the parts of it that lack theirs.
        Raises what there is no room for."""
        ...


class Backends(Protocol):
    """Whoever lets callers in."""

    @property
    def frontend(self) -> Frontend | None:
        """The front end, where it is in this process."""
        ...

    async def admit(self, caller: Caller) -> Backend:
        """The engine for a request. Raises Unauthorized."""
        ...

    async def health(self) -> Health:
        """The engine's state, for probes, which show no key."""
        ...

    def metrics(self) -> bytes:
        """Metrics in Prometheus' format. Raises NotFound where they are told elsewhere."""
        ...

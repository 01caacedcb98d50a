"""A client that does random things: asks, cancels, stops reading, loses connections, resumes, repeats keys."""

from __future__ import annotations

import asyncio
import random
import string
from collections.abc import Awaitable, Callable
from dataclasses import replace

import msgspec

from cierzo.engine.messages import FEATURES

from .history import Attempt, Body, History, Request
from .images import NUM_TOKENS, illustrated
from .link import POISON
from .network import Network
from .peer import Peer, frame

HELLO_S = 30.0
PATTERNS = ("[0-9A-Z]{1,8}", "(AB|C)*D", "X{0,9}(YY|Z)", "[A-Z]{40,60}", "0|1[0-5]*", "(A|B|C ){2,30}")
SYSTEM_TIMEOUT_S = 15.0  # until a system gives a half-open connection up


class Client:
    """Behaviour drawn from `rng`; everything that happens goes into the history."""

    def __init__(
        self,
        rng: random.Random,
        network: Network,
        history: History,
        number: int,
        vocab_size: int,
        max_model_len: int,
        poisoned: bool,
        everybody: list[Peer],
        thinks: bool = False,
        tenant: str = "",
        key: str = "",
        holds: bool = False,
        sees: bool = False,
    ) -> None:
        self.rng = rng
        self._network = network
        self._history = history
        self._number = number
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._poisoned = poisoned
        self._everybody = everybody
        self._thinks = thinks
        self._holds = holds  # some answers to grammars
        self._sees = random.Random(f"images {number}") if sees else None  # some prompts have images
        self._tenant, self._key = tenant, key  # "": the server has none
        self._loop = asyncio.get_running_loop()
        self.peers: list[Peer] = []
        self.mine: list[Request] = []
        self._features = rng.choice(
            (None, None, None, (), ("resume",), ("resume", "credit", "accounting", "batches"))
        )

    # --- the whole life --------------------------------------------------------------------------------

    async def run(self, num_turns: int) -> None:
        """Do random things, so many."""
        turns: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (10, self._generate),
            (4, self._cancel),
            (2, self._cancel_by_id),
            (3, self._stop_reading),
            (3, self._lose_connection),
            (3, self._repeat_key),
            (1, self._reuse_key),
            (3, self._ask),
            (2, self._junk),
            (1, self._another_connection),
        ]
        if self._tenant:
            turns.append((2, self._take_another_s))
        weights = [weight * self.rng.random() for weight, _ in turns]
        weights[0] += 5
        for _ in range(num_turns):
            await asyncio.sleep(self.rng.random() ** 4 * 0.4)
            await self.rng.choices([turn for _, turn in turns], weights)[0]()

    async def finish(self) -> None:
        """Read all there is, take up what was lost, and wait for the end of everything."""
        for peer in self.peers:
            self._read_again(peer)
        for request in self.mine:
            for _ in range(5):
                if not request.attempts or request.has_ended or not await self._wait(request):
                    break

    def close(self) -> None:
        """Close all connections."""
        for peer in self.peers:
            peer.wire.close()

    # --- turns -----------------------------------------------------------------------------------------

    async def _generate(self) -> None:
        peer = await self._peer()
        if peer is None:
            return
        request = self._new_request(peer)
        self.mine.append(request)
        self._history.requests.append(request)
        self._send(peer, request)

    async def _cancel(self) -> None:
        open_ = [attempt for peer in self.peers if peer.is_up for attempt in peer.attempts.values()]
        if open_:
            attempt = self.rng.choice(open_)
            peer = next(one for one in self.peers if attempt in one.attempts.values())
            now = self._loop.time()
            attempt.request.cancelled_s.append(now)
            if attempt.cancelled_s is None:
                attempt.cancelled_s = now
            peer.say({"type": "cancel", "stream": attempt.stream})

    async def _cancel_by_id(self) -> None:
        peer = await self._peer()
        known = [one for one in self._history.requests if one.request_id is not None]
        if peer is None or "resume" not in peer.features:
            return
        if not known or self.rng.random() < 0.1:
            peer.ask("cancel_request", ("error",), request_id=f"{self.rng.getrandbits(128):032x}")
            return
        request = self.rng.choice(known)
        if request.tenant != self._tenant:
            peer.ask("cancel_request", ("error",), request_id=request.request_id)
            return
        request.cancelled_s.append(self._loop.time())
        peer.ask("cancel_request", ("done", "error"), request_id=request.request_id)

    async def _take_another_s(self) -> None:
        """Try to read the answer of another tenant's request, whose id has leaked."""
        peer = await self._peer()
        known = [one for one in self._history.requests if one.request_id and one.tenant != self._tenant]
        if peer is not None and known and "resume" in peer.features:
            request = self.rng.choice(known)
            received = [0] * request.num_samples
            peer.ask("resume", ("error",), request_id=request.request_id, received=received)

    async def _stop_reading(self) -> None:
        """For a while, up to more than a server bears."""
        peer = await self._peer()
        if peer is None:
            return
        seconds = self.rng.choice((0.05, 0.5, 4.0)) * self.rng.random()
        if self.rng.random() < 0.5 and "credit" in peer.features:
            peer.withholds_credit = True
            peer.disturb()
        else:
            peer.pause(True)
        self._loop.call_later(seconds, self._read_again, peer)

    def _read_again(self, peer: Peer) -> None:
        peer.give_credit()
        peer.pause(False)

    async def _lose_connection(self) -> None:
        peer = await self._peer()
        if peer is None:
            return
        open_ = [attempt.request for attempt in peer.attempts.values()]
        leave = self.rng.choice((peer.wire.close, peer.wire.reset, peer.wire.vanish))
        leave()
        if leave == peer.wire.vanish and "keepalive" not in peer.features:
            self._loop.call_later(SYSTEM_TIMEOUT_S, peer.wire.time_out)
        peer.pause(False)
        await asyncio.sleep(self.rng.random() ** 2 * 0.5)
        for request in open_:
            if self.rng.random() < 0.7:
                await self._take_up(request)

    async def _repeat_key(self) -> None:
        peer = await self._peer()
        keyed = [one for one in self._history.requests if self._has_key(one)]
        if self._thinks and peer is not None:  # else it depends on who comes first, in which form the answer comes
            keyed = [one for one in keyed if one.is_apart == ("parts" in peer.features)]
        for feature, field in (("grammars", "grammar"), ("images", "images")):
            if peer is not None and feature not in peer.features:
                keyed = [one for one in keyed if field not in one.body]
        if peer is not None and keyed and "resume" in peer.features:
            self._send(peer, self.rng.choice(keyed))

    async def _reuse_key(self) -> None:
        peer = await self._peer()
        keyed = [one for one in self._history.requests if self._has_key(one) and one.request_id]
        if peer is None or not keyed or "resume" not in peer.features:
            return
        body = self.rng.choice(keyed).body
        *before, last = body["token_ids"]
        peer.ask("generate", ("error",), **{**body, "token_ids": [*before, 2 if last > 2 else 3]})

    async def _ask(self) -> None:
        peer = await self._peer()
        if peer is not None:
            kind = self.rng.choice(("ping", "health", "stats", "model"))
            peer.ask(kind, ("pong" if kind == "ping" else f"{kind}_reply",))

    async def _junk(self) -> None:
        """Send a message that is wrong in a way that names its stream; or, on a connection of its own, anything."""
        if self.rng.random() < 0.5:
            peer = await self._peer()
            if peer is not None:
                wrong: list[Body] = [
                    {"type": "generate"},
                    {"type": "generate", "token_ids": [1 << 63]},
                    {"type": "generate", "token_ids": [5], "sampling": {"top_p": "high"}},
                    {"type": "generate", "text": "x", "token_ids": [5]},
                    {"type": "nonsense"},
                    {"type": "ping", "surplus": 1},
                ]
                fields = dict(self.rng.choice(wrong))
                peer.ask(str(fields.pop("type")), ("error",), **fields)
            return
        wire = self._network.connect()
        if self.rng.random() < 0.6:
            wire.send(frame({"type": "hello", "magic": "cierzo", "version": self.rng.choice((1, 2, 3, 4))}))
        if self.rng.random() < 0.5:
            wire.send(self.rng.randbytes(self.rng.choice((1, 5, 60, 3000))))
        else:
            wire.send(
                frame({"type": self.rng.choice(("hello", "ping", "final")), "stream": -self.rng.randrange(9)})
            )
        self._loop.call_later(self.rng.random() * 4, self.rng.choice((wire.close, wire.reset)))

    async def _another_connection(self) -> None:
        if len(self.peers) < 6:
            self._connect()

    # --- inside ----------------------------------------------------------------------------------------

    def _has_key(self, request: Request) -> bool:
        """Tell whether an idempotency key stands for this request, where this client uses it."""
        return "idempotency_key" in request.body and request.tenant == self._tenant

    def _connect(self) -> Peer:
        wanted = FEATURES if self._features is None else self._features
        peer = Peer(self._network.connect(), self._history, wanted, self._key)
        self.peers.append(peer)
        self._everybody.append(peer)
        return peer

    async def _peer(self) -> Peer | None:
        """A connection that works; a new one, if there is none."""
        self.peers = [peer for peer in self.peers if not peer.wire.is_lost or peer.attempts]
        up = [peer for peer in self.peers if peer.is_up]
        if up:
            return self.rng.choice(up)
        peer = self._connect()
        try:
            async with asyncio.timeout(HELLO_S):
                await asyncio.shield(peer.welcome)
        except TimeoutError:
            peer.wire.reset()
        return peer if peer.is_up else None

    def _new_request(self, peer: Peer) -> Request:
        rng, number = self.rng, len(self._history.requests)
        most = self._max_model_len // 2
        prompt = [rng.randrange(2, self._vocab_size) for _ in range(rng.choice((1, 5, 10, most)))]
        prompt[:3] = [
            2 + number % 50,
            2 + number // 50 % 50,
            2 + self._number,
        ]  # the request is known by its prompt
        if self._poisoned and rng.random() < 0.15:
            prompt[0] = POISON
        sampling: Body = {
            "max_tokens": rng.randint(1, rng.choice((4, 30, self._max_model_len))),
            "seed": rng.randint(0, 5),
            "n": rng.choice((1, 1, 1, 2, 3)),
            "ignore_eos": rng.random() < 0.5,
        }
        if rng.random() < 0.3:
            sampling["stop"] = [
                "".join(rng.choices(string.ascii_letters, k=rng.choice((1, 1, 2)))) for _ in range(3)
            ]
        if rng.random() < 0.2:
            sampling["logprobs"] = rng.randrange(3)
        images: list[bytes] = []
        if self._sees is not None:
            prompt = [min(token, self._vocab_size - NUM_TOKENS - 1) for token in prompt]
            if "images" in peer.features and prompt[0] != POISON and self._sees.random() < 0.6:
                prompt, images = illustrated(self._sees, prompt, self._max_model_len - 1, self._vocab_size)
        body: Body = {"type": "generate", "token_ids": prompt, "sampling": sampling}
        if images:
            body["images"] = images
        if self._holds and "grammars" in peer.features and rng.random() < 0.4:
            body["grammar"] = {"kind": "regex", "value": rng.choice(PATTERNS)}
        if rng.random() < 0.2:
            body["deltas"] = False
        if rng.random() < 0.2:
            body["deadline_s"] = rng.choice((0.02, 0.3, 2.0))
        if rng.random() < 0.2:
            body["priority"] = rng.randint(-2, 2)
        if rng.random() < 0.5 and "resume" in peer.features:
            own = sum(one.tenant == self._tenant for one in self._history.requests)
            body["idempotency_key"] = f"key {own}"  # which another tenant may use too
        as_text = rng.random() < 0.2 and all(9 < token < 127 for token in prompt) and not images
        return Request(number, body, as_text, self._tenant)

    def _send(self, peer: Peer, request: Request) -> Attempt:
        message = dict(request.body)
        if request.as_text:
            message["text"] = bytes(message.pop("token_ids")).decode()
        elif "attach" in peer.features and "idempotency_key" not in message:
            if self.rng.random() < 0.2:
                return self._send_attached(peer, request, message)
            if self._sees is not None and "images" in message and self._sees.random() < 0.5:
                return self._send_images(peer, request, message, self._sees)
        return peer.start(request, message, "generate")

    def _send_attached(self, peer: Peer, request: Request, message: Body) -> Attempt:
        data = msgspec.msgpack.encode(message.pop("token_ids"))
        stream, cut = peer.next_stream() + 1, self.rng.randrange(len(data))
        for part in (data[:cut], data[cut:]):
            peer.say({"type": "attach", "stream": stream, "data": part})
        return peer.start(request, {**message, "attached": "token_ids"}, "attached")

    def _send_images(self, peer: Peer, request: Request, message: Body, rng: random.Random) -> Attempt:
        """Send images ahead of their request, in one or two pieces each."""
        stream = peer.next_stream() + 1
        for number, file in enumerate(message.pop("images")):
            cut = rng.randrange(len(file))
            for part in (file[:cut], file[cut:]) if rng.random() < 0.5 else (file,):
                peer.say({"type": "attach", "stream": stream, "data": part, "image": number})
        return peer.start(request, message, "generate")

    async def _take_up(self, request: Request) -> bool:
        """Go on with a request whose connection was lost; whether that can be."""
        last = request.attempts[-1]
        if "resume" not in last.features or last.end is not None:
            return False
        if (peer := await self._peer()) is None or "resume" not in peer.features:
            return False
        if request.request_id is None:
            if "idempotency_key" not in request.body:
                return False
            self._send(peer, request)
            return True
        base = self._shortened(last) if self.rng.random() < 0.3 else last
        received = [len(tokens) for tokens in base.tokens]
        peer.start(
            request, {"type": "resume", "request_id": request.request_id, "received": received}, "resume", base
        )
        return True

    def _shortened(self, last: Attempt) -> Attempt:
        """As if the last deltas had not been kept."""
        tokens, texts, logprobs, marks = map(list, (last.tokens, last.texts, last.logprobs, last.marks))
        thoughts = list(last.thoughts)
        sample = self.rng.randrange(len(tokens))
        if marks[sample]:
            at = self.rng.randrange(len(marks[sample]))
            num_tokens, num_chars, num_thought = marks[sample][at]
            thoughts[sample] = thoughts[sample][:num_thought]
            marks[sample] = marks[sample][: at + 1]
            tokens[sample] = tokens[sample][:num_tokens]
            texts[sample] = texts[sample][:num_chars]
            logprobs[sample] = logprobs[sample][:num_tokens]
        changed = {"tokens": tokens, "texts": texts, "thoughts": thoughts, "logprobs": logprobs, "marks": marks}
        return replace(last, **changed, shortened=True)

    async def _wait(self, request: Request) -> bool:
        """Wait until an attempt has ended or its connection was lost; whether to look again."""
        last = request.attempts[-1]
        peer = next((one for one in self._everybody if last in one.attempts.values()), None)
        if peer is None:
            return await self._take_up(request)
        try:
            async with asyncio.timeout(120.0):
                while last.is_open:
                    peer.news.clear()
                    await peer.news.wait()
        except TimeoutError:
            return False
        return True

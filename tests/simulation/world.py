"""A world: server, core, network, clients and troubles, all of it a function of one seed."""

from __future__ import annotations

import asyncio
import logging
import random
import tempfile
from collections import Counter

import msgspec

from cierzo.bench.virtual import VirtualClock, VirtualLoop
from cierzo.cache.config import CacheConfig
from cierzo.engine.frontend import rpc
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.core_side import PATIENCE_S
from cierzo.engine.frontend.keys import key_line
from cierzo.engine.frontend.tenants import RIGHTS
from cierzo.engine.messages import ModelInfo
from cierzo.engine.testing.words import fake_model
from cierzo.engine.text.token_table import token_table
from cierzo.engine.worker.fake import fake_config
from cierzo.scheduler.config import SchedulerConfig

from .checker import Checker, costs
from .client import Client
from .history import History
from .house import House
from .images import vision
from .link import SimulatedLink, patience
from .network import Network
from .peer import Peer
from .reference import References, byte_tokenizer

WATCH_S = 0.05
LATE_S = 0.1  # by which a stream may outlive its deadline in the tables
TENANTS = {"ann": 1.0, "bob": 4.0}  # of every third world, with their weights; each one's name is its key


class _Errors(logging.Handler):
    """Notes what the server logs with a trace: a bug that it survived."""

    def __init__(self, history: History) -> None:
        super().__init__(logging.ERROR)
        self._history = history

    def emit(self, record: logging.LogRecord) -> None:
        """Note it."""
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            self._history.wrong(f"logged: {record.getMessage()}: {type(error).__name__}: {error}")


class World:
    """`run` gives what was wrong; `counts` what happened."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.clock = VirtualClock(100.0)
        self.history = History()
        self.counts: Counter[str] = Counter()
        self.limits = FrontendConfig(
            max_frame_bytes=64 * 1024,
            max_attached_bytes=16 * 1024,
            max_connections=rng.choice((5, 64, 1024)),
            max_streams_per_connection=rng.choice((2, 16, 1024)),
            max_open_samples=rng.choice((8, 64, 4096)),
            max_open_tokens=rng.choice((400, 8192, 1 << 20)),
            high_water_bytes=rng.choice((300, 4096, 262_144)),
            stream_credit_bytes=rng.choice((1024, 8192, 262_144)),
            max_pending_bytes=rng.choice((500, 65_536, 1 << 20)),
            keepalive_s=rng.choice((1.0, 5.0)),
            slow_reader_s=rng.choice((1.0, 3.0)),
            orphan_s=rng.choice((1.0, 8.0)),
            max_deadline_s=100.0,
            default_deadline_s=rng.choice((20.0, 60.0)),
        )
        self.eos = (7,) if rng.random() < 0.7 else ()
        self.vocab_size = rng.choice((100, 128, 300))
        max_model_len = rng.choice((24, 64, 120))
        block_tokens = rng.choice((2, 4, 8))
        least = -(-max_model_len // block_tokens)
        max_running = rng.choice((2, 4, 8))
        budget_tokens = rng.randint(max_running, max_running + 60)
        self.config = fake_config(
            SchedulerConfig(
                budget_tokens=budget_tokens,
                max_chunk_tokens=rng.randint(1, budget_tokens),
                max_running=max_running,
                max_waiting=1 << 16,
                max_model_len=max_model_len,
            ),
            CacheConfig(
                block_tokens=block_tokens,
                num_blocks=rng.choice((least, 2 * least, 8 * least)),
                prefix_caching=rng.random() < 0.9,
                hash_key="00" * 16,
            ),
            vocab_size=self.vocab_size,
            eos_token_ids=self.eos,
        )
        self.thinks = seed % 4 == 0  # the model marks its thoughts
        # Some requests are held to grammars, which a model without an end has none of.
        self.vocabulary = (
            token_table(byte_tokenizer(), self.vocab_size, self.eos) if self.eos and not seed % 5 else None
        )
        self.tenants = [*TENANTS] if seed % 3 == 1 else []
        self.sees = not seed % 7  # prompts may have images
        if self.sees:
            images = random.Random(f"images {seed}")
            kept, stages = images.choice((1, 16, 40)), images.choice((1, 1, 3))
            scheduler = msgspec.structs.replace(self.config.scheduler, image_cache_tokens=kept, image_stages=stages)
            self.config = msgspec.structs.replace(self.config, scheduler=scheduler)
        self.is_calm = False
        self.everybody: list[Peer] = []

    # --- from seed to verdict --------------------------------------------------------------------------

    def run(self) -> list[str]:
        """Live through it; what was wrong, empty if nothing."""
        loop = VirtualLoop(self.clock)
        loop.set_exception_handler(lambda _, context: self.history.wrong(f"unhandled: {context}"))
        logger, errors = logging.getLogger("cierzo"), _Errors(self.history)
        logger.addHandler(errors)
        propagates, logger.propagate = logger.propagate, False
        try:
            with patience():
                loop.run_until_complete(self._live(loop))
                references = References(self.config, self.vocabulary)
                wrongs = Checker(self.history, self.link, self.limits, references, self.thinks).check()
            self._count()
            return wrongs
        except Exception as error:
            return [*self.history.wrongs, f"{type(error).__name__}: {error}"]
        finally:
            logger.removeHandler(errors)
            logger.propagate = propagates
            loop.close()

    def _house(self) -> House:
        """The server, which has keys where there are tenants."""
        seed, limits = random.Random(self.rng.random()), self.limits
        with tempfile.NamedTemporaryFile("w") as keys:
            for tenant in self.tenants:
                line = f'{{"tenant": "{tenant}", "weight": {TENANTS[tenant]}}}'
                print(line, key_line(tenant, tenant, RIGHTS), sep="\n", file=keys, flush=True)
            if self.tenants:
                limits = msgspec.structs.replace(limits, keys=keys.name)
            return House(seed, limits, self._model(), self.link, self.clock, self.thinks)

    async def _live(self, loop: VirtualLoop) -> None:
        rng = self.rng
        seed = random.Random(rng.random())
        self.link = SimulatedLink(seed, self.config, self.limits, self.clock, self.vocabulary)
        house = self._house()
        self.frontend, self.server = house.frontend, house.server
        self.network = Network(random.Random(rng.random()), self.server)
        poisoned = rng.random() < 0.15
        clients = [self._client(number, poisoned) for number in range(rng.randint(1, 4))]
        sides = [loop.create_task(self._troubles()), loop.create_task(self._watch())]
        await asyncio.gather(*(client.run(rng.choice((8, 20, 40))) for client in clients))
        self.is_calm = True
        await sides[0]
        for wire in self.network.wires:
            wire.freeze(False)
        await asyncio.gather(*(client.finish() for client in clients))
        for client in clients:
            client.close()
        await asyncio.sleep(self.limits.orphan_s + 2 * self.limits.keepalive_s + self.limits.default_deadline_s)
        sides[1].cancel()
        for ended in await asyncio.gather(*sides, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended
        self._check_empty()
        await house.close()
        await asyncio.gather(*(peer.task for peer in self.everybody))
        await asyncio.sleep(rpc.LINGER_S)
        self._check_nothing_left(loop)

    def _client(self, number: int, poisoned: bool) -> Client:
        tenant = self.tenants[number % len(self.tenants)] if self.tenants else ""
        return Client(
            random.Random(self.rng.random()),
            self.network,
            self.history,
            number,
            self.vocab_size,
            self.config.scheduler.max_model_len,
            poisoned,
            self.everybody,
            self.thinks,
            tenant,
            tenant,
            self.vocabulary is not None,
            self.sees,
        )

    def _model(self) -> ModelInfo:
        return fake_model(
            vocab_size=self.vocab_size,
            max_model_len=self.config.scheduler.max_model_len,
            block_tokens=self.config.cache.block_tokens,
            num_blocks=self.config.cache.num_blocks,
            eos_token_ids=list(self.eos),
            has_chat_template=False,
            vision=vision(self.vocab_size) if self.sees else None,
        )

    # --- troubles --------------------------------------------------------------------------------------

    async def _troubles(self) -> None:
        """Deaths, stalls, leaps of time, frozen links, drains; each world has its own mixture."""
        rng = self.rng
        kinds = [self._die, self._leap, self._swizzle, self._stall, self._drain]
        chosen = [kind for kind in kinds if rng.random() < 0.4]
        every_s = rng.choice((0.1, 0.5, 2.0))
        while not self.is_calm:
            await asyncio.sleep(rng.random() * 2 * every_s)
            if chosen and not self.is_calm:
                kind = rng.choice(chosen)
                self.counts[kind.__name__.strip("_")] += 1
                await kind()
        if rng.random() < 0.03:
            self.counts["fail"] += 1
            self.link.fail()

    async def _die(self) -> None:
        self.link.die()

    async def _stall(self) -> None:
        self.link.stall(self.rng.choice((0.05, 1.0, 4.0, 30.0)))

    async def _leap(self) -> None:
        now, seconds = self.clock(), self.rng.choice((0.2, 3.0, 30.0)) * self.rng.random()
        self.history.leaps.append((now, now + seconds))
        self.clock.now_s += seconds

    async def _swizzle(self) -> None:
        await self.network.swizzle()

    async def _drain(self) -> None:
        wire = self.network.connect()
        peer = Peer(wire, self.history, (), self.tenants[0] if self.tenants else "")
        self.everybody.append(peer)
        self.history.drains.append(self.clock())
        if await peer.welcome is not None:
            peer.ask("drain", ("drained", "error"))  # an error if it is undone first
            await asyncio.sleep(self.rng.random())
            peer.ask("drain", ("done",), undo=True)
        await asyncio.sleep(0.1)
        wire.close()

    # --- invariants of the server ----------------------------------------------------------------------

    async def _watch(self) -> None:
        """Limits hold at any moment, and nothing outlives its deadline."""
        limits, streams = self.limits, self.frontend.streams
        while True:
            await asyncio.sleep(WATCH_S)
            now = self.clock()
            if streams.num_samples > limits.max_open_samples or streams.num_tokens > limits.max_open_tokens:
                self.history.wrong(f"{streams.num_samples} samples, {streams.num_tokens} tokens open")
            for connection in self.server._connections:
                if len(streams.of(connection)) > limits.max_streams_per_connection:
                    self.history.wrong(f"{len(streams.of(connection))} streams on a connection")
                if (kept := bytes_kept(connection)) > limits.max_frame_bytes + 4:
                    self.history.wrong(f"{kept} bytes kept of a frame")
            for stream in streams:
                if now > stream.deadline_at_s + LATE_S + self.history.leapt_s(stream.deadline_at_s, now):
                    self.history.wrong(
                        f"{now}: request {stream.request_id}, due at {stream.deadline_at_s}, outlives it"
                    )

    def _check_empty(self) -> None:
        """All clients are gone, all requests over: nothing is left in tables and core."""
        streams, wrong = self.frontend.streams, self.history.wrong
        if len(streams) or streams.num_samples or streams.num_tokens:
            wrong(f"left open: {len(streams)} streams, {streams.num_samples} samples, {streams.num_tokens} tokens")
        for pool in self.frontend.tenancy.pools.values():
            is_kept = pool._name in ("max_kept_bytes", "max_idempotency_keys")  # for a while after the end
            if not is_kept and (pool.num or pool._excess):
                wrong(f"left of {pool._name}: {pool.num}, beyond the parts that are kept {pool._excess}")
        for book in self.frontend.tenancy.books():
            if book.num_requests or book.num_tokens or book.num_tokenless:
                wrong(f"left in a book: {book}")
        if self.frontend.heap.num_bytes or self.frontend.heap._pixels:
            wrong(f"left on the heap: {self.frontend.heap.num_bytes} bytes")
        if self.server._connections:
            wrong(f"left open: {len(self.server._connections)} connections")
        life = self.link.life
        if life is None or self.link.has_failed:
            return
        core = life.core
        core.check()
        if core._pixels._living or core._pixels._coming or core._scheduler._images._left:
            wrong(f"left of images: {[*core._pixels._living]}, {core._pixels._coming}")
        self.counts["towers"] += len(core._runner.towers)
        stats = core.stats()
        if (stats.running, stats.waiting, stats.free_blocks) != (0, 0, stats.total_blocks):
            wrong(f"left in the core: {stats}")
        # What a core tells of a request that ended without its word, as that was late, is in no final.
        is_late = self.link.step_s > PATIENCE_S["deadline"]
        is_told = not (is_late or self.link.deaths or self.link.stalls or self.history.leaps)
        sums = costs(self.history) if is_told else None
        if sums is None:
            return
        again = sums["recomputed_tokens"] - stats.recomputed_tokens  # by later runs, of which a core does not know
        if sums["computed_tokens"] != stats.computed_tokens or again < 0 or (again and not self.link.has_repeated):
            wrong(f"costs are {sums}, the core counted {stats}")

    def _check_nothing_left(self, loop: VirtualLoop) -> None:
        """Closed: no task, no timer."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        if tasks:
            self.history.wrong(f"tasks are left: {tasks}")
        ours = [timer for timer in loop._scheduled if not timer.cancelled() and "simulation" not in repr(timer)]
        if ours:
            self.history.wrong(f"timers are left: {ours}")

    def _count(self) -> None:
        for request in self.history.requests:
            for attempt in request.attempts:
                self.counts[attempt.kind] += 1
                self.counts["thoughts"] += any(attempt.thoughts)
                self.counts["lost"] += attempt.lost_s is not None
                end = attempt.end
                if end is not None and end["type"] == "error":
                    self.counts[end["code"]] += 1
                for sample in end["samples"] if end is not None and end["type"] == "final" else ():
                    self.counts[sample["finish_reason"]] += 1
                    self.counts["seen"] += "images" in request.body and sample["finish_reason"] == "length"
                    self.counts["held"] += "grammar" in request.body and sample["finish_reason"] == "stop"
        self.counts["questions"] += len(self.history.questions)
        self.counts["hello"] += len(self.everybody)


def bytes_kept(connection: rpc.Connection) -> int:
    """Bytes of an unfinished frame that a connection holds."""
    reader = connection._frames
    return len(reader._frame) + len(reader._data) - reader._at

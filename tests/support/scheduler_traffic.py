"""Traffic for a scheduler over tiny pools, with a simulated model that reads what it needs through block tables.

The simulated cache keeps, at each (block, offset), the whole prefix that a real model's latent depends on: the
tokens so far and the form of each. The next token is a function of what is read back, so a block that is shared
wrongly, overwritten, or not written shows at once, and every request can be run alone for comparison.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import msgspec

from cierzo.cache.config import CacheConfig
from cierzo.cache.manager import KVCacheManager
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.plan import RequestKey, SeqPlan, StepPlan, StepResult
from cierzo.scheduler.request import NewRequest, QueueFull
from cierzo.scheduler.scheduler import Scheduler

EOS = 2
Prefix = tuple[tuple[int, bool], ...]  # (token, is prompt) from the start


def next_token(prefix: Prefix, seed: int) -> int:
    """0 or 1, sometimes EOS."""
    word = zlib.crc32(repr((prefix, seed)).encode())
    return EOS if word % 29 == 0 else word & 1


def run_alone(new: NewRequest, max_model_len: int) -> tuple[list[int], str]:
    """Output tokens and finish reason of a request that has the machine to itself, spelled out once more."""
    prefix: Prefix = tuple((token, True) for token in new.prompt_token_ids)
    output: list[int] = []
    while len(output) < new.sampling.max_tokens and len(prefix) < max_model_len:
        token = next_token(prefix, new.sampling.seed or 0)
        output.append(token)
        prefix += ((token, False),)
        if token == EOS and len(output) >= new.sampling.min_tokens:
            return output, "stop"
    return output, "length"


def entry(prefix: Prefix, token: int) -> msgspec.Raw:
    """What a prompt's token is told to be worth behind this prefix."""
    return msgspec.Raw(msgspec.msgpack.encode(zlib.crc32(repr((prefix, token)).encode())))


def entries_alone(new: NewRequest) -> list[msgspec.Raw]:
    """All entries of a prompt, spelled out once more."""
    prompt = new.prompt_token_ids
    if new.sampling.prompt_logprobs is None:
        return []
    return [entry(tuple((token, True) for token in prompt[:at]), prompt[at]) for at in range(1, len(prompt))]


@dataclass
class Model:
    """Computes a plan from nothing but the plan, and its own pages and tables."""

    block_tokens: int
    pages: dict[tuple[int, int], Prefix] = field(default_factory=dict)
    tables: dict[int, list[int]] = field(default_factory=dict)
    seeds: dict[tuple[RequestKey, int], int] = field(default_factory=dict)

    def run(self, plan: StepPlan, tokens_of: dict[RequestKey, list[int]]) -> StepResult:
        written: set[tuple[int, int]] = set()
        results = [self._sequence(seq, tokens_of[seq.key], written) for seq in plan.seqs]
        scored = {index: self._score(seq) for index, seq in enumerate(plan.seqs) if seq.scoring is not None}
        return StepResult(results, prompt_logprobs=scored)

    def _score(self, seq: SeqPlan) -> list[msgspec.Raw]:
        assert seq.scoring is not None
        start, token_ids = seq.scoring.start, seq.scoring.token_ids
        assert token_ids
        assert seq.start <= start <= start + len(token_ids) <= seq.start + len(seq.token_ids)
        return [
            entry(self.pages[self._place(seq.slot, position)], token)
            for position, token in enumerate(token_ids, start)
        ]

    def _place(self, slot: int, position: int) -> tuple[int, int]:
        block, offset = divmod(position, self.block_tokens)
        return self.tables[slot][block], offset

    def _sequence(self, seq: SeqPlan, tokens: list[int], written: set[tuple[int, int]]) -> list[int]:
        if seq.admission is not None:
            self.tables[seq.slot] = []
            self.seeds[seq.key, seq.epoch] = seq.admission.sampling.seed or 0
            known = [*seq.admission.prompt_token_ids, *seq.admission.output_token_ids]
            assert known == tokens
        self.tables[seq.slot] += seq.new_block_ids
        own: Prefix = tuple((token, position < seq.num_prompt_tokens) for position, token in enumerate(tokens))
        end = seq.start + len(seq.token_ids)
        assert tokens[seq.start : end] == seq.token_ids
        for position in range(seq.start):
            assert self.pages[self._place(seq.slot, position)] == own[: position + 1]
        for position in range(seq.start, end):
            place = self._place(seq.slot, position)
            assert place not in written, f"{place} is written twice in one step"
            written.add(place)
            self.pages[place] = own[: position + 1]
        assert seq.samples == (end == len(tokens))
        last = self.pages[self._place(seq.slot, end - 1)]
        return [next_token(last, self.seeds[seq.key, seq.epoch])] if seq.samples else []


class Traffic:
    """Drives a scheduler, keeps the books of what was accepted and delivered, and checks after every step."""

    def __init__(self, cache: CacheConfig, limits: SchedulerConfig) -> None:
        self.now = 0.0
        self.limits = limits
        self.cache = KVCacheManager(cache)
        self.scheduler = Scheduler(limits, self.cache, lambda: self.now)
        self.model = Model(cache.block_tokens)
        self.accepted: dict[RequestKey, NewRequest] = {}
        self.output: dict[RequestKey, list[int]] = {}
        self.entries: dict[RequestKey, list[msgspec.Raw]] = {}
        self.ended: dict[RequestKey, str] = {}
        self.num_refused = 0

    def add(self, new: NewRequest) -> None:
        try:
            self.scheduler.add(new)
        except QueueFull:
            self.num_refused += 1
            assert self.scheduler.stats().waiting >= self.limits.max_waiting
            return
        key = (new.request_id, new.sample)
        self.accepted[key] = new
        self.output[key] = list(new.output_token_ids)
        self.entries[key] = entries_alone(new)[: new.num_scored]
        self.collect()

    def abort(self, request_id: int, sample: int | None) -> None:
        alive = [key for key in self.accepted if key[0] == request_id and key not in self.ended]
        expected = [key for key in alive if sample in (None, key[1])]
        assert self.scheduler.abort(request_id, sample) == len(expected)
        self.collect()
        assert all(self.ended.get(key) for key in expected)

    def step(self, *, abort: int | None = None, fail: int | None = None) -> None:
        """One step; `abort` a request between plan and result, or let sequence number `fail` fail."""
        self.now += 1.0
        self.check_order(plan := self.scheduler.schedule())
        self.collect()
        self.scheduler.check()
        result = self.model.run(plan, {key: self.tokens(key) for key in self.accepted})
        if abort is not None:
            self.abort(abort, None)
        if fail is not None and plan.seqs:
            result = msgspec.structs.replace(result, failures={fail % len(plan.seqs): "told to"})
        self.scheduler.commit(plan, result)
        self.collect()
        self.scheduler.check()

    def tokens(self, key: RequestKey) -> list[int]:
        return [*self.accepted[key].prompt_token_ids, *self.output[key]]

    def check_order(self, plan: StepPlan) -> None:
        counts = [len(seq.token_ids) for seq in plan.seqs]
        assert sum(counts) == plan.num_tokens <= self.limits.budget_tokens
        assert all(counts)
        assert len({seq.key for seq in plan.seqs}) == len(plan.seqs) <= self.limits.max_running
        assert plan.seqs or not self.scheduler.has_work(), "there is work, and nothing is done"
        running = self.scheduler._running
        admitted = [running[seq.key].order for seq in plan.seqs if seq.admission is not None]
        waiting = []
        for request in self.scheduler._tenants.waiting():  # who waits for a prefix may be overtaken
            if not self.scheduler._cache.is_coming(request.blocks, request.findable_tokens):
                waiting.append(request.order)
        assert not admitted or not waiting or max(admitted) < min(waiting), "someone overtook"

    def collect(self) -> None:
        for delta in self.scheduler.take_deltas():
            key = (delta.request_id, delta.sample)
            assert key not in self.ended, f"{key} goes on after its end"
            self.output[key] += delta.token_ids
            self.entries[key] += delta.prompt_logprobs or []
            if delta.finish is not None:
                self.ended[key] = delta.finish.reason
                assert delta.finish.output_tokens == len(self.output[key])

    def finish(self) -> None:
        """Run to the end: within a bound, everyone ended once, with the tokens it gets alone."""
        self.scheduler.check()
        total = sum(len(new.prompt_token_ids) + new.sampling.max_tokens for new in self.accepted.values())
        bound = 4 * total + 10
        while self.scheduler.has_work():
            assert bound > 0, "someone starves"
            bound -= 1
            self.step()
        assert self.ended.keys() == self.accepted.keys()
        assert self.cache.num_free == self.cache.num_blocks
        self.cache.check([])
        for key, new in self.accepted.items():
            tokens, reason = run_alone(new, self.limits.max_model_len)
            entries = entries_alone(new)
            has_token = len(self.output[key]) > len(new.output_token_ids)
            assert self.entries[key] == (entries if has_token else entries[: len(self.entries[key])])
            if self.ended[key] in ("stop", "length"):
                assert (self.output[key], self.ended[key]) == (tokens, reason)
            else:
                assert self.output[key] == tokens[: len(self.output[key])]

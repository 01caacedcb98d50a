"""Random traffic for minutes, far beyond what the suite's random tests try: `make soak`, by hand.

    python tests/soak.py [--minutes 10] [--seed N] [--worlds N]

Each seed is a world: a core with random, mostly tight limits, a runner whose next token depends on every token that
it reads back through the block table, and requests that arrive, branch, repeat one another's answers, are aborted,
run out of time, meet a failing step, or live through the death of their core. In a quarter of the worlds the tokens
come from the real sampler, with all its parameters; in half of them requests are of several tenants. After every
step the invariants are checked; at the end every request must have ended once, with the tokens and their
log-probabilities that it gets alone, or the first of them if it was cut short.

The last line is PASS, or the seed of the world that failed: `--seed N --worlds 1` repeats it.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from cierzo.cache.config import CacheConfig
from cierzo.cache.hashing import BlockHasher
from cierzo.engine.messages import Abort, Finish, Submit, TokenLogprobs
from cierzo.engine.worker.batch import Batch
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.fake import FakeRunner, fake_config
from cierzo.engine.worker.sampling import Sampled, Sampler
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.registry import bind
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.params import SamplingParams
from cierzo.scheduler.plan import RequestKey, SeqPlan, StepPlan, StepResult

VOCAB = 48
EOS = (47,)
TABLE = torch.randn(1009, VOCAB, generator=torch.Generator().manual_seed(5)) * 2
MOST_STEPS = 20_000


class WeakHasher(BlockHasher):
    """A few bits of a real digest: collisions everywhere."""

    def digest(
        self, parent: bytes, packed: bytes, num_prompt_tokens: int, salt: bytes, images: bytes = b""
    ) -> bytes:
        """The digest with all but its last two bits cleared."""
        whole = super().digest(parent, packed, num_prompt_tokens, salt, images)
        return bytes(15) + bytes([whole[15] & 3])


class SoakRunner(FakeRunner):
    """Tokens from made-up numbers, or (`sampler`) from made-up logits; breaks when told."""

    def __init__(self, cache: CacheConfig, max_running: int, sampled: bool) -> None:
        super().__init__(
            vocab_size=VOCAB,
            num_blocks=cache.num_blocks,
            block_tokens=cache.block_tokens,
            max_running=max_running,
        )
        self._sampler = Sampler(max_running) if sampled else None
        self._sampled: Sampled | None = None  # of the step that is not collected
        self.breaks = False
        self.bad_row = False

    def launch(self, plan: StepPlan, batch: Batch) -> None:
        """As told: half of a step's work may be done when it breaks."""
        super().launch(plan, batch)
        if self.breaks:
            self.reset()  # nothing of such a step is remembered, but for what it wrote
            raise RuntimeError("told to")

    def collect(self) -> StepResult:
        """The result of the step, which can fail no more: penalties count its tokens from now on."""
        if self._sampled is not None:
            self._sampled.remember()
            self._sampled = None
        return super().collect()

    def reset(self) -> None:
        """Forget what was launched."""
        super().reset()
        self._sampled = None

    def _admit(self, seq: SeqPlan) -> None:
        super()._admit(seq)
        assert seq.admission is not None
        if self._sampler is not None:
            self._sampler.admit(seq.slot, seq.key[1], seq.admission)

    def _choose(self, plan: StepPlan, batch: Batch, words: NDArray[np.uint64]) -> StepResult:
        if self._sampler is None:
            result = super()._choose(plan, batch, words)
        else:
            result = self._sample(plan, batch, words)
        if self.bad_row and plan.seqs:
            return StepResult(result.token_ids, result.logprobs, {plan.step % len(plan.seqs): "told to"})
        return result

    def _sample(self, plan: StepPlan, batch: Batch, words: NDArray[np.uint64]) -> StepResult:
        token_ids: list[list[int]] = [[] for _ in plan.seqs]
        logprobs: list[list[TokenLogprobs] | None] = [None] * len(plan.seqs)
        if not batch.sample_seqs:
            return StepResult(token_ids)
        assert self._sampler is not None
        logits = TABLE[torch.from_numpy((words % np.uint64(len(TABLE))).astype(np.int64))].clone()
        sampling = [plan.seqs[index] for index in batch.sample_seqs]
        positions = [seq.start + len(seq.token_ids) for seq in sampling]
        sampled = self._sampled = self._sampler.sample(logits, [seq.slot for seq in sampling], positions)
        for row, index in enumerate(batch.sample_seqs):
            token_ids[index] = [sampled.token_ids[row]]
            logprobs[index] = sampled.logprobs[row] if sampled.logprobs else None
        return StepResult(
            token_ids, logprobs, {batch.sample_seqs[row]: why for row, why in sampled.failures.items()}
        )


@dataclass
class Answer:
    """What one sample has been given."""

    request: Submit
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: Finish | None = None


class World:
    """One core and its traffic, all of it a function of the seed."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.now = 0.0
        self.sampled = rng.random() < 0.25
        block_tokens = rng.choice((1, 2, 3, 4, 4, 7, 8, 16))
        max_model_len = rng.choice((8, 24, 24, 64, 64, 200))
        least = -(-max_model_len // block_tokens)
        max_running = rng.randint(1, 8)
        budget_tokens = rng.randint(max_running, max_running + rng.choice((1, 8, 60, 200)))
        self.limits = SchedulerConfig(
            budget_tokens=budget_tokens,
            max_chunk_tokens=rng.randint(1, budget_tokens),
            max_running=max_running,
            max_waiting=rng.choice((3, 12, 100)),
            max_model_len=max_model_len,
            priority_aging_s=rng.choice((0.0, 2.0, 30.0)),
        )
        self.cache = CacheConfig(
            block_tokens=block_tokens,
            num_blocks=rng.randint(least, rng.choice((least + 2, 2 * least, 4 * least))),
            prefix_caching=rng.random() < 0.9,
            hash_key="00" * 16,
        )
        self.weak = rng.random() < 0.25
        self.apart = random.Random(f"tenants {seed}")  # so that worlds of one tenant are what they were
        names = [f"tenant {number}" for number in range(self.apart.choice((1, 1, 2, 3)))]
        self.weights = {name: self.apart.choice((0.001, 1.0, 1.0, 4.0, 1000.0)) for name in names}
        self.answers: dict[RequestKey, Answer] = {}
        self.counts: Counter[str] = Counter()
        self.start()

    def start(self) -> None:
        """A new core; what an earlier one had in its cache is gone."""
        self.runner = SoakRunner(self.cache, self.limits.max_running, self.sampled)
        config = fake_config(self.limits, self.cache, vocab_size=VOCAB, eos_token_ids=EOS)
        self.core = EngineCore(config, self.runner, lambda: self.now)
        if self.weak:
            self.core._cache._hasher = WeakHasher(b"")

    def run(self) -> None:
        """Traffic, then the end of it."""
        rate = self.rng.choice((0.05, 0.1, 0.3, 0.3, 1.0))
        trouble = self.rng.choice((0.0, 0.02, 0.1))
        for _ in range(self.rng.choice((30, 100, 300))):
            while self.rng.random() < rate / (1 + rate):
                if self.core.stats().waiting < self.limits.max_waiting - 1 or self.rng.random() < 0.1:
                    self.submit(self.request())
            if self.rng.random() < trouble:
                self.trouble()
            self.step()
        for _ in range(MOST_STEPS):
            self.step()
            if not self.core.has_work():
                break
        self.account()

    def step(self) -> None:
        """One step of the core, checked, and what came of it, or of arrivals, written down."""
        self.now += self.rng.choice((0.0, 0.01, 0.2))
        for delta in self.core.step_plain():
            answer = self.answers[delta.request_id, delta.sample]
            assert answer.finish is None, f"{delta} after the end"
            answer.tokens += delta.token_ids
            answer.logprobs += delta.logprobs or []
            answer.finish = delta.finish
        self.core.check()
        self.runner.breaks = self.runner.bad_row = False

    def submit(self, request: Submit) -> None:
        """Hand a new request in."""
        for sample in range(request.first_sample, request.first_sample + request.sampling.n):
            self.answers[request.request_id, sample] = Answer(request, list(request.output_token_ids))
        self.core.submit(request)

    def request(self) -> Submit:
        """A prompt that is new, or goes on from another, or from another one's answer."""
        rng, limit = self.rng, self.limits.max_model_len
        kind = rng.random()
        prompt: list[int] = []
        if self.answers and kind < 0.6:
            other = rng.choice(list(self.answers.values()))
            prompt = list(other.request.prompt_token_ids)
            if kind < 0.3:
                prompt = [*prompt, *other.tokens]
            prompt = prompt[: rng.randint(0, len(prompt))] if kind < 0.1 else prompt
        fresh = rng.choice((0, 1, 5, limit // 2, limit))
        prompt = [*prompt, *(rng.randrange(3) for _ in range(rng.randint(0, fresh)))][:limit] or [1]
        sampling = self.sampling()
        request = Submit(
            request_id=len(self.answers) + 1_000_000 * rng.randint(0, 1),
            prompt_token_ids=prompt,
            sampling=sampling,
            priority=rng.randint(-1, 1),
            deadline_at_s=rng.choice((None, None, None, self.now + 0.5, self.now + 10.0, self.now + 60.0)),
        )
        if len(self.weights) > 1:
            name = self.apart.choice([*self.weights])
            salt = self.apart.choice((b"", name.encode()))
            request = msgspec.structs.replace(request, tenant=name, weight=self.weights[name], cache_salt=salt)
            self.counts["of tenants"] += 1
        if sampling.n == 1 and len(prompt) < limit and rng.random() < 0.2:
            before = alone(request, self)[0].tokens
            request = msgspec.structs.replace(request, output_token_ids=before[: rng.randint(0, len(before))])
        return request

    def sampling(self) -> SamplingParams:
        """Any parameters that validation lets pass."""
        rng = self.rng
        max_tokens = rng.randint(1, rng.choice((2, 12, 60, 150)))
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=rng.choice((0, 0, rng.randint(0, max_tokens))),
            temperature=rng.choice((0.0, 0.5, 1.0, 3.0)),
            top_k=rng.choice((0, 0, 1, 5, VOCAB)),
            top_p=rng.choice((1.0, 1.0, 0.7)),
            min_p=rng.choice((0.0, 0.0, 0.1)),
            repetition_penalty=rng.choice((1.0, 1.0, 1.4, 0.7)),
            presence_penalty=rng.choice((0.0, 0.0, 1.0, -1.0)),
            frequency_penalty=rng.choice((0.0, 0.0, 0.5)),
            logit_bias=rng.choice(({}, {}, {EOS[0]: 4.0, 3: -2.0})),
            seed=rng.randint(0, 3),
            n=rng.choice((1, 1, 1, 2, 4)),
            stop_token_ids=rng.choice(((), (), (5,), (5, 6, 7))),
            ignore_eos=rng.random() < 0.6,
            logprobs=rng.choice((None, None, 0, 3)),
        )

    def trouble(self) -> None:
        """An abort, a failing step, a failing row, or the death of the core."""
        kind = self.rng.choice(("abort", "abort", "abort", "breaks", "bad_row", "bad_row", "death"))
        self.counts[kind] += 1
        if kind == "abort" and self.answers:
            request_id, sample = self.rng.choice(list(self.answers))
            self.core.abort(Abort(request_id=request_id, sample=self.rng.choice((sample, None))))
        elif kind == "breaks":
            self.runner.breaks = True
        elif kind == "bad_row":
            self.runner.bad_row = True
        elif kind == "death":
            self.account_core()
            self.start()
            for (_, sample), answer in self.answers.items():
                if answer.finish is None:
                    request = answer.request
                    params = msgspec.structs.replace(request.sampling, n=1)
                    self.core.submit(
                        msgspec.structs.replace(
                            request, sampling=params, output_token_ids=list(answer.tokens), first_sample=sample
                        )
                    )

    def account_core(self) -> None:
        """Add this core's figures to the world's."""
        stats = self.core.stats()
        self.counts.update(
            steps=stats.steps, preemptions=stats.preemptions, cached=stats.cached_tokens, tokens=stats.output_tokens
        )

    def account(self) -> None:
        """Everyone ended once and rightly, and nothing is left."""
        assert not self.core.has_work(), "someone starves"
        self.account_core()
        stats = self.core.stats()
        assert (stats.running, stats.waiting) == (0, 0), stats
        assert stats.free_blocks == stats.total_blocks, stats
        expected: dict[int, list[Answer]] = {}
        for (request_id, sample), answer in self.answers.items():
            assert answer.finish is not None, f"{request_id}, {sample} never ended"
            overloaded = answer.finish.message.startswith("overloaded")
            self.counts["overloaded" if overloaded else answer.finish.reason] += 1
            if overloaded:
                continue
            if request_id not in expected:
                expected[request_id] = alone(answer.request, self)
            right = expected[request_id][sample - answer.request.first_sample]
            self.compare(answer, right)

    def compare(self, answer: Answer, right: Answer) -> None:
        """Whole if it ended by itself; as far as it came if not."""
        assert answer.finish is not None
        assert right.finish is not None
        count = len(answer.tokens)
        by_itself = answer.finish.reason in ("stop", "length")
        assert answer.tokens == right.tokens[:count], (answer, right)
        assert answer.logprobs == right.logprobs[: len(answer.logprobs)], (answer, right)
        if answer.request.sampling.logprobs is not None:
            assert len(answer.logprobs) == count - len(answer.request.output_token_ids), answer
        if by_itself:
            for name in ("reason", "output_tokens", "prompt_tokens", "stop_token_id"):
                assert getattr(answer.finish, name) == getattr(right.finish, name), (name, answer, right)
            assert count == len(right.tokens), (answer, right)
        else:
            assert answer.finish.reason in ("cancelled", "deadline", "failed"), answer


def alone(request: Submit, world: World) -> list[Answer]:
    """The request's samples in a roomy core, without chunks, hits, neighbours or deadline."""
    limits = SchedulerConfig(
        budget_tokens=4096, max_chunk_tokens=4096, max_running=4, max_model_len=world.limits.max_model_len
    )
    cache = CacheConfig(block_tokens=16, num_blocks=4 * (limits.max_model_len // 16 + 1), prefix_caching=False)
    runner = SoakRunner(cache, 4, world.sampled)
    core = EngineCore(fake_config(limits, cache, vocab_size=VOCAB, eos_token_ids=EOS), runner, lambda: 0.0)
    core.submit(msgspec.structs.replace(request, arrival_s=None, deadline_at_s=None))
    first, n = request.first_sample, request.sampling.n
    answers = {sample: Answer(request, list(request.output_token_ids)) for sample in range(first, first + n)}
    while any(answer.finish is None for answer in answers.values()):
        for delta in core.step_plain():
            answer = answers[delta.sample]
            answer.tokens += delta.token_ids
            answer.logprobs += delta.logprobs or []
            answer.finish = delta.finish
    return list(answers.values())


def main() -> int:
    """Run worlds until the time is up or one fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="stop after this time")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first world")
    parser.add_argument("--worlds", type=int, default=sys.maxsize, metavar="N", help="stop after so many")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bind(KernelsConfig(), "cpu")
    logging.disable(logging.ERROR)  # steps that break are logged with their trace
    counts: Counter[str] = Counter()
    start, seed = time.monotonic(), arguments.seed
    with tqdm(total=round(arguments.minutes * 60), unit="s", disable=None, delay=2.0) as bar:
        while seed < arguments.seed + arguments.worlds and (elapsed := time.monotonic() - start) < bar.total:
            bar.update(int(elapsed) - bar.n)
            world = World(seed)
            try:
                world.run()
            except Exception:
                traceback.print_exc()
                print(f"{world.limits}\n{world.cache}\nFAIL  world {seed}")
                return 1
            counts.update(world.counts)
            seed += 1
    print(", ".join(f"{count:,} {name}" for name, count in sorted(counts.items())))
    print(f"PASS  {seed - arguments.seed:,} worlds in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

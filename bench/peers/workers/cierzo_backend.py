"""cierzo's engine core in this process, stepped by hand as vLLM's is: what serves, without the sockets."""

import time
from collections.abc import Iterator
from typing import Any

from cierzo.engine.config import EngineOptions, resolve
from cierzo.engine.environment import spin_briefly
from cierzo.engine.messages import SamplingParams, Submit, TokenDelta
from cierzo.engine.server_process import prepare_memory
from cierzo.engine.worker.core import EngineCore

PROMPT_SHARE = 4  # a forced sequence is prompt up to a quarter of its length, then generated tokens


class Backend:
    """Options are those of `EngineOptions`."""

    def __init__(self, checkpoint: str, **options: Any) -> None:
        spin_briefly()
        self.core = EngineCore(resolve(EngineOptions(model=checkpoint, **options)))
        prepare_memory()

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[float]]:
        """Greedy, no end token, in steps."""
        times: list[list[float]] = [[] for _ in prompts]
        start = time.perf_counter()
        for deltas in self._steps([(prompt, []) for prompt in prompts], max_tokens=new_tokens):
            now = time.perf_counter() - start
            for delta in deltas:
                times[delta.request_id] += [now] * len(delta.token_ids)
        return times

    def top_logprobs(self, sequences: list[list[int]], count: int) -> list[list[list[tuple[int, float]]]]:
        """Score sequences in both forms of attention: the first quarter of each is prompt, the rest generated.

        One request for each position, which generates one token more; the prefix cache carries what they share.
        """
        found: list[list[list[tuple[int, float]]]] = [[] for _ in sequences]
        for positions, sequence in zip(found, sequences, strict=True):
            prompt_tokens = len(sequence) // PROMPT_SHARE
            for end in range(1, len(sequence) + 1):
                prompt, output = sequence[: min(end, prompt_tokens)], sequence[prompt_tokens:end]
                steps = self._steps([(prompt, output)], max_tokens=len(output) + 1, logprobs=count)
                (entry,) = (entry for deltas in steps for delta in deltas for entry in delta.logprobs or [])
                positions.append(list(zip(entry.top_token_ids, entry.top_logprobs, strict=True)))
        return found

    def _steps(self, requests: list[tuple[list[int], list[int]]], **params: Any) -> Iterator[list[TokenDelta]]:
        """Hand (prompt, output so far) to the core, and step it to the end; request ids count from 0.

        Raises RuntimeError for a request that failed.
        """
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, seed=0, **params)
        for number, (prompt, output) in enumerate(requests):
            self.core.submit(
                Submit(request_id=number, prompt_token_ids=prompt, output_token_ids=output, sampling=sampling)
            )
        while self.core.has_work():
            deltas = self.core.step_plain()
            for delta in deltas:
                if delta.finish is not None and delta.finish.reason == "failed":
                    raise RuntimeError(f"request {delta.request_id} failed: {delta.finish.message}")
            yield deltas

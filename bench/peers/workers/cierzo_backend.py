"""cierzo's engine core in this process, stepped by hand as vLLM's is: what serves, without the sockets."""

import time
from typing import Any

from cierzo.engine.config import EngineOptions, resolve, spin_briefly
from cierzo.engine.messages import SamplingParams, Submit, TokenDelta
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.process import prepare_memory

PROMPT_SHARE = 4  # a forced sequence is prompt up to a quarter of its length, then generated tokens


class Backend:
    """Options are those of `EngineOptions`."""

    def __init__(self, checkpoint: str, **options: Any) -> None:
        spin_briefly()
        self.core = EngineCore(resolve(EngineOptions(model=checkpoint, **options)))
        prepare_memory()
        self.num_requests = 0

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[float]]:
        """Greedy, no end token, in steps."""
        sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True, seed=0)
        times: list[list[float]] = [[] for _ in prompts]
        start = time.perf_counter()
        first = self._submit([(prompt, []) for prompt in prompts], sampling)
        while self.core.has_work():
            deltas = self.core.step_plain()
            now = time.perf_counter() - start
            for delta in _healthy(deltas):
                times[delta.request_id - first] += [now] * len(delta.token_ids)
        return times

    def top_logprobs(self, sequences: list[list[int]], count: int) -> list[list[list[list[float]]]]:
        """Score sequences in both forms of attention: the first quarter of each is prompt, the rest generated.

        One request for each position, which generates one token more; the prefix cache carries what they share.
        """
        return [self._top_of(sequence, count) for sequence in sequences]

    def _top_of(self, sequence: list[int], count: int) -> list[list[list[float]]]:
        prompt_tokens = len(sequence) // PROMPT_SHARE
        found: list[list[list[float]]] = []
        for length in range(1, len(sequence) + 1):
            cut = min(length, prompt_tokens)
            sampling = SamplingParams(
                max_tokens=length - cut + 1, temperature=0.0, ignore_eos=True, seed=0, logprobs=count
            )
            self._submit([(sequence[:cut], sequence[cut:length])], sampling)
            while self.core.has_work():
                for delta in _healthy(self.core.step_plain()):
                    for entry in delta.logprobs or []:
                        found.append(
                            [list(pair) for pair in zip(entry.top_token_ids, entry.top_logprobs, strict=True)]
                        )
        return found

    def _submit(self, requests: list[tuple[list[int], list[int]]], sampling: SamplingParams) -> int:
        """Hand (prompt, output so far) to the core; the id of the first."""
        first = self.num_requests
        for prompt, output in requests:
            self.core.submit(
                Submit(
                    request_id=self.num_requests,
                    prompt_token_ids=prompt,
                    output_token_ids=output,
                    sampling=sampling,
                )
            )
            self.num_requests += 1
        return first


def _healthy(deltas: list[TokenDelta]) -> list[TokenDelta]:
    """The deltas; a request that failed ends the measurement."""
    for delta in deltas:
        if delta.finish is not None and delta.finish.reason == "failed":
            raise RuntimeError(f"request {delta.request_id} failed: {delta.finish.message}")
    return deltas

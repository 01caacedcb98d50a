"""vLLM in this process's charge: its engine is stepped by hand, so that every token can be timed."""

import time
from typing import Any

from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

GREEDY = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}


class Backend:
    """Options are those of `vllm.LLM`. Prompts are token ids and no text is made: no tokenizer is loaded."""

    def __init__(self, checkpoint: str, **options: Any) -> None:
        self.llm = LLM(model=checkpoint, skip_tokenizer_init=True, dtype="bfloat16", **options)
        self.num_requests = 0

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[float]]:
        """Greedy, no end token, in steps."""
        params = SamplingParams(max_tokens=new_tokens, output_kind=RequestOutputKind.DELTA, **GREEDY)
        engine = self.llm.llm_engine
        first = self.num_requests
        times: list[list[float]] = [[] for _ in prompts]
        start = time.perf_counter()
        for prompt in prompts:
            engine.add_request(str(self.num_requests), {"prompt_token_ids": prompt}, params)
            self.num_requests += 1
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter() - start
            for output in outputs:
                # vLLM appends a random suffix to ids of its own making, never to those that it hands back
                times[int(output.request_id) - first] += [now] * len(output.outputs[0].token_ids)
        return times

    def top_logprobs(self, sequences: list[list[int]], count: int) -> list[list[list[list[float]]]]:
        """Position i is what the prompt's token i + 1 was likely to be; the last one comes with the next token."""
        params = SamplingParams(max_tokens=1, logprobs=count, prompt_logprobs=count, **GREEDY)
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in sequences], params, use_tqdm=False)
        return [
            [_top(position, count) for position in (*output.prompt_logprobs[1:], output.outputs[0].logprobs[0])]
            for output in outputs
        ]


def _top(position: dict[int, Any], count: int) -> list[list[float]]:
    """vLLM adds the prompt's own token, whatever its rank."""
    ranked = sorted(position.items(), key=lambda item: item[1].rank)
    return [[token, entry.logprob] for token, entry in ranked[:count]]

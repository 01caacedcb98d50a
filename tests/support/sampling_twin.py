"""Sampling from a table of logits, directly and slowly, token by token: what an engine must give."""

from __future__ import annotations

import math
from typing import Any

import torch
from grammar_twin import has_ended, permits
from torch import Tensor

from cierzo.engine.messages import Submit, ThinkingBudget, TokenLogprobs
from cierzo.kernels.ref import sampling as ref
from cierzo.scheduler.params import SamplingParams

VOCAB = 40
EOS = 39
TABLE = torch.randn(211, VOCAB, generator=torch.Generator().manual_seed(5)) * 2


NOT_SAMPLING = ("banned", "thinking", "output", "grammar")


def row_of(token_id: int, position: int) -> Tensor:
    return TABLE[(token_id * 31 + position) % len(TABLE)]


def edited(raw: Tensor, params: SamplingParams, prompt: list[int], output: list[int]) -> Tensor:
    """Bias, penalties, mask, in this order, one value at a time in fp32."""
    logits = raw.clone()
    for token_id, bias in params.logit_bias.items():
        logits[token_id] += torch.tensor(bias)
    penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    repetition, presence, frequency = (torch.tensor(value) for value in penalties)
    if penalties != (1.0, 0.0, 0.0):
        for token_id in {*prompt, *output}:
            value = logits[token_id]
            value = value / repetition if value > 0 else value * repetition
            value = value - frequency * output.count(token_id)
            logits[token_id] = value - presence * (token_id in output)
    stops = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
    if len(output) + 1 < params.min_tokens:
        for token_id in stops:
            logits[token_id] = -math.inf
    return logits


def must_close(thinking: ThinkingBudget | None, output: list[int]) -> bool:
    """Whether the token behind the output must be the one that closes a thought: the whole is read anew."""
    if thinking is None:
        return False
    opened = -1 if thinking.is_open else None  # place of the marker
    for place, token in enumerate(output):
        if opened is None:
            opened = place if token == thinking.open_id else None
        elif token == thinking.close_id:
            opened = None
    return opened is not None and len(output) - 1 - opened >= thinking.max_tokens


def permitted(request: Submit, output: list[int], vocab_size: int = VOCAB) -> list[int]:
    """Tokens that may stand behind the output, by their definitions. Empty: none."""
    if must_close(request.thinking, output):
        return [request.thinking.close_id]
    return [
        token
        for token in request.sampling.allowed_token_ids or range(vocab_size)
        if not any([*output, token][-len(word) :] == [*word] for word in request.banned_token_ids)
        and (not request.grammar or token in permits(request.grammar, output))
    ]


def masked(logits: Tensor, request: Submit, output: list[int]) -> Tensor:
    """Leave what is permitted; a thought is closed whatever else is asked for."""
    left = torch.full_like(logits, -math.inf)
    for token in permitted(request, output):
        left[token] = 0.0 if must_close(request.thinking, output) else logits[token]
    return left


def directly(request: Submit, sample: int) -> tuple[list[int], list[TokenLogprobs]]:
    """A request, token by token, without an engine; it ends where nothing is left to choose."""
    params, prompt = request.sampling, request.prompt_token_ids
    output: list[int] = [*request.output_token_ids]
    logprobs: list[TokenLogprobs] = []
    stops = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
    while len(output) < params.max_tokens and not (request.grammar and has_ended(request.grammar, output)):
        position = len(prompt) + len(output)
        raw = row_of([*prompt, *output][-1], position - 1)
        logits = masked(edited(raw, params, prompt, output), request, output)
        if logits.max() == -math.inf:
            break
        if params.temperature == 0:
            token = logits.tolist().index(float(logits.max()))
        else:
            whole = [torch.tensor([value]) for value in (params.top_k, params.seed, sample, position)]
            real = [
                torch.tensor([v], dtype=torch.float64) for v in (params.temperature, params.top_p, params.min_p)
            ]
            token = int(ref.draw(logits[None], real[0], whole[0], real[1], real[2], *whole[1:]))
        output.append(token)
        if params.logprobs is not None:
            scores = torch.log_softmax(raw, dim=0).tolist()
            top = sorted(range(VOCAB), key=lambda i, scores=scores: (-scores[i], i))[: params.logprobs]
            logprobs.append(TokenLogprobs(token, scores[token], top, [scores[i] for i in top]))
        if token in stops and len(output) >= params.min_tokens:
            break
    return output[len(request.output_token_ids) :], logprobs


VARIETY = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 0},
    {"temperature": 1.0, "logprobs": 4},
    {"temperature": 0.6, "top_k": 5},
    {"temperature": 1.5, "top_p": 0.7, "logprobs": 2},
    {"temperature": 1.0, "min_p": 0.1, "n": 3},
    {"temperature": 1.0, "repetition_penalty": 1.3},
    {"temperature": 0.0, "presence_penalty": 1.5, "logprobs": 1},
    {"temperature": 0.0, "frequency_penalty": 0.9, "repetition_penalty": 0.8},
    {"temperature": 0.9, "logit_bias": {3: 4.0, 8: -50.0}},
    {"temperature": 0.0, "logit_bias": {EOS: 100.0}, "min_tokens": 6},
    {"temperature": 1.0, "logit_bias": {EOS: 3.0, 5: 2.0}, "stop_token_ids": (5, 6), "min_tokens": 4, "n": 2},
    {"temperature": 0.0, "logit_bias": {EOS: 100.0}, "min_tokens": 6, "ignore_eos": True},
    {
        "temperature": 0.8,
        "frequency_penalty": 1.0,
        "presence_penalty": -0.5,
        "top_k": 9,
        "top_p": 0.9,
        "min_p": 0.01,
    },
    # These choose the same token again and again: it is in the penalties before the host has heard of it.
    {"temperature": 0.0, "frequency_penalty": 0.4, "logit_bias": {3: 9.0, 4: 8.9}},
    {"temperature": 0.0, "repetition_penalty": 1.1, "logit_bias": {5: 9.0}, "logprobs": 3},
    {"temperature": 0.7, "presence_penalty": 2.0, "logit_bias": {5: 9.0, 6: 9.0, 7: 9.0}},
    {
        "temperature": 0.0,
        "logit_bias": {3: 9.0, 4: 8.9},
        "banned": [[3, 3], [4, 3, 4], [3, 4, 4, 4]],
        "logprobs": 1,
    },
    {"temperature": 0.9, "allowed_token_ids": (3, 4, 5, EOS), "banned": [[4], [5, 3]], "logprobs": 2},
    {
        "temperature": 0.7,
        "logit_bias": {5: 9.0, 6: 9.0, 7: 9.0},
        "repetition_penalty": 1.1,
        "n": 2,
        "banned": [[5], [6, 6], [7, 6], [7, 7, 7], [6, 7, 7], [6, 7, 7, 6]],
    },
    {"temperature": 0.0, "logit_bias": {8: 20.0}, "thinking": ThinkingBudget(3, 8, 9), "min_tokens": 9},
    {"temperature": 0.8, "allowed_token_ids": (3, 4, 9), "thinking": ThinkingBudget(2, 3, 9, True)},
    {"temperature": 0.8, "logit_bias": {8: 9.0, 7: 9.0}, "thinking": ThinkingBudget(0, 8, 9), "n": 2},
]


def variety() -> list[Submit]:
    """A request of each kind."""
    return [
        request_of(number, [1 + number % 3, 2, 7, 7][: 1 + number % 4], params)
        for number, params in enumerate(VARIETY)
    ]


def request_of(number: int, prompt: list[int], params: dict[str, Any]) -> Submit:
    """A request with its masks, which the front end would have encoded."""
    sampling = {name: value for name, value in params.items() if name not in NOT_SAMPLING}
    return Submit(
        request_id=number,
        prompt_token_ids=prompt,
        sampling=SamplingParams(**{"max_tokens": 12, "seed": 100 + number, **sampling}),
        output_token_ids=params.get("output", []),
        banned_token_ids=params.get("banned", []),
        thinking=params.get("thinking"),
        grammar=params.get("grammar", ""),
    )

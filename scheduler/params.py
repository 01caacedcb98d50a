"""What a client may ask of one generation. Checked by `frontend.validate`, read by scheduler and sampler."""

from __future__ import annotations

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How to draw the tokens of one request, and when to stop.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 switch their filter off. Penalties look at
    the request's own tokens: `repetition_penalty` at prompt and output, the other two at the output alone.
    `seed` None means: one is drawn at admission, and kept for the life of the request.
    `logprobs` is the number of top alternatives reported beside each chosen token (0: the chosen token
    alone, None: nothing); they are an fp32 log-softmax of the raw logits, before penalties and temperature.
    """

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

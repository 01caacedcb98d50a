"""Parameters of one generation. Checked by `frontend.validate`, read by scheduler and sampler."""

from __future__ import annotations

from numbers import Integral
from typing import Annotated

import msgspec
from msgspec import Meta

# Fields of several values, of which one alone is taken too.
_SEVERAL = (
    *(("stop", str), ("stop_token_ids", Integral)),
    *(("bad_words", str), ("allowed_token_ids", Integral)),
)


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How to draw the tokens of one request, and when to stop.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 switch their filter off. Penalties look at
    the request's own tokens: `repetition_penalty` at prompt and output, the other two at the output alone.
    `seed` None means: one is drawn at admission, and kept for the life of the request.
    `logprobs` is the number of top alternatives reported beside each chosen token (0: the chosen token
    alone, None: nothing); they are an fp32 log-softmax of the raw logits, before penalties and temperature.
    `prompt_logprobs` is the same for the prompt: an entry for each of its tokens but the first, which follows none.
    Masks (`allowed_token_ids`, `bad_words`, `max_thinking_tokens`) apply after penalties and before temperature;
    engine/text/masks.py has the rule for words. Each thought of an answer has the budget.
    `stop="x"` means `stop=("x",)`, and `stop_token_ids=3` means `stop_token_ids=(3,)`, as with `bad_words` and
    `allowed_token_ids`; lists and sets do as well.
    """

    max_tokens: Annotated[int, Meta(description="output tokens, at most")] = 256
    min_tokens: Annotated[int, Meta(description="output tokens before which nothing stops the answer")] = 0
    temperature: Annotated[float, Meta(description="0: greedy")] = 0.7
    top_k: Annotated[int, Meta(description="keep the k most likely tokens; 0: all")] = 0
    top_p: Annotated[float, Meta(description="keep the most likely tokens up to this probability mass")] = 1.0
    min_p: Annotated[
        float, Meta(description="keep tokens of at least this share of the likeliest one's probability; 0: all")
    ] = 0.0
    repetition_penalty: Annotated[
        float, Meta(description="divides the logits of tokens that prompt or output hold; 1: off")
    ] = 1.0
    presence_penalty: Annotated[float, Meta(description="taken off the logits of tokens that the output holds")] = (
        0.0
    )
    frequency_penalty: Annotated[float, Meta(description="the same, for each time that it holds them")] = 0.0
    logit_bias: Annotated[dict[int, float], Meta(description="added to the logits of token ids")] = {}
    seed: Annotated[int | None, Meta(description="repeats a generation; default: a new one each time")] = None
    n: Annotated[int, Meta(description="answers to the same prompt")] = 1
    stop: Annotated[tuple[str, ...], Meta(description="a text that ends the answer, and is not part of it")] = ()
    stop_token_ids: Annotated[
        tuple[int, ...], Meta(description="a token id that ends the answer, and is part of it")
    ] = ()
    ignore_eos: Annotated[bool, Meta(description="the model's own end tokens do not end the answer")] = False
    logprobs: Annotated[int | None, Meta(description="most likely tokens reported beside each chosen one")] = None
    prompt_logprobs: Annotated[
        int | None, Meta(description="most likely tokens reported beside each of the prompt")
    ] = None
    allowed_token_ids: Annotated[
        tuple[int, ...], Meta(description="the only tokens to choose from; none: all")
    ] = ()
    bad_words: Annotated[
        tuple[str, ...], Meta(description="a text that no answer holds, as its tokens spell it")
    ] = ()
    max_thinking_tokens: Annotated[
        int | None, Meta(description="tokens of a thought, after which it is closed")
    ] = None

    def __post_init__(self) -> None:
        for name, single in _SEVERAL:
            value = getattr(self, name)
            if type(value) is tuple:
                continue
            if isinstance(value, single):
                msgspec.structs.force_setattr(self, name, (value,))
            elif isinstance(value, list | set | frozenset):
                msgspec.structs.force_setattr(self, name, tuple(value))


class ThinkingBudget(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Tokens that each thought of an answer may have; the token after them is the closing one.

    open_id, close_id: the tokens that begin and end a thought. is_open: the prompt ends within one, which has used
    nothing of the budget when the answer begins.
    """

    max_tokens: int
    open_id: int
    close_id: int
    is_open: bool = False

"""Texts and conversations as tokens, and tokens as text: what is answered, and nothing of who asks."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend import validate
from cierzo.engine.frontend.bounds import count
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.frames import Buffer
from cierzo.engine.frontend.image_parts import images_of
from cierzo.engine.frontend.wire_checks import MAX_PIECES
from cierzo.engine.messages import (
    Detokenize,
    Detokenized,
    Generate,
    ModelInfo,
    Tokenize,
    Tokenized,
    TokenizerInfo,
    Worded,
)
from cierzo.engine.text.prompt import PromptEncoder
from cierzo.engine.text.template_chat import TemplateChat
from cierzo.engine.text.vocabulary import Vocabulary, refuse_unfit

MAX_TEXT_BYTES = 4 * 1024 * 1024  # of a text, and of pieces together: more would hold the event loop
DECODERS: dict[str, Callable[[Buffer], Tokenize | Detokenize]] = {
    "tokenize": msgspec.msgpack.Decoder(Tokenize).decode,
    "detokenize": msgspec.msgpack.Decoder(Detokenize).decode,
}
_PLAIN = Tokenize(stream=0)


def prompt_of(message: Tokenize) -> Generate:
    """The request whose prompt is asked about."""
    return Generate(
        stream=message.stream,
        text=message.text,
        messages=message.messages,
        tools=message.tools,
        reasoning_effort=message.reasoning_effort,
    )


class Wording:
    """Answers by a tokenizer and a chat template. Holds no state between answers."""

    def __init__(self, prompts: PromptEncoder, config: FrontendConfig, model: ModelInfo) -> None:
        self._prompts = prompts
        self._config = config
        self._model = model
        self._spellings = {token_id: word.encode() for word, token_id in prompts.special_ids.items()}

    def weight(self, message: Tokenize | Detokenize) -> int:
        """The work of an answer, in characters of text that take as long to encode."""
        if isinstance(message, Detokenize):
            return len(message.token_ids)
        return self._prompts.weight(prompt_of(message))

    def answer(self, message: Tokenize | Detokenize) -> Worded:
        """Raises InvalidRequest; for more tokens than the model's context has, too."""
        if isinstance(message, Detokenize):
            return self._detokenized(message)
        most = self._model.max_model_len
        token_ids = self._token_ids(message, most)
        if len(token_ids) > most:
            field = "messages" if message.text is None else "text"
            what = f"{field} has {len(token_ids)} tokens, the context {most}"
            raise InvalidRequest(what, field=field, limit=most, value=len(token_ids))
        return Tokenized(stream=message.stream, token_ids=token_ids)

    def info(self, stream_id: int) -> TokenizerInfo:
        """Describe the tokenizer."""
        prompts, tokenizer = self._prompts, self._prompts.tokenizer
        if tokenizer is None:
            return TokenizerInfo(stream=stream_id)
        roles = {role: tokenizer.spellings.get(role, "") for role in ("bos_token", "eos_token", "pad_token")}
        template = prompts.template.template.source if isinstance(prompts.template, TemplateChat) else ""
        return TokenizerInfo(stream=stream_id, kind=tokenizer.kind, chat_template=template, **roles)

    def _token_ids(self, message: Tokenize, most: int) -> list[int]:
        given = [name for name in ("text", "messages") if getattr(message, name) is not None]
        if len(given) != 1:
            limit, value = "exactly one of text, messages", ", ".join(given) or "none"
            raise InvalidRequest(f"{limit} is needed", field="text", limit=limit, value=value)
        prompt, prompts = prompt_of(message), self._prompts
        validate.fields(prompt, self._config, self._model, prompts.special_ids, efforts=prompts.efforts)
        if message.text is None:
            for field in ("special_tokens", "control_tokens"):
                if (value := getattr(message, field)) != getattr(_PLAIN, field):
                    what = f"{field} is of a text: a conversation has the tokens that its template gives it"
                    raise InvalidRequest(what, field=field, limit="with text", value=value)
            # not `prompts.encode`, which another class may have changed: nothing is to be generated
            images = images_of(prompt, self._config, self._model)
            return PromptEncoder.encode(prompts, prompt, most, images).token_ids
        tokenizer = self._tokenizer("text")
        refuse_unfit(tokenizer, "text", message.text, most)
        if message.control_tokens:
            return tokenizer.encode_spelled(message.text, alone=not message.special_tokens)
        return (tokenizer.encode if message.special_tokens else tokenizer.encode_piece)(message.text)

    def _detokenized(self, message: Detokenize) -> Detokenized:
        tokenizer = self._tokenizer("token_ids")
        token_ids, most = message.token_ids, MAX_PIECES if message.pieces else self._model.max_model_len
        count("token_ids", token_ids, min(most, self._model.max_model_len))
        if token_ids:
            validate.token_ids("token_ids", token_ids, self._model.vocab_size)
        spelled = [tokenizer.token_bytes(token_id) or self._spellings.get(token_id, b"") for token_id in token_ids]
        said = spelled if message.control_tokens else map(tokenizer.token_bytes, token_ids)
        text = b"".join(said).decode("utf-8", errors="replace")
        text = text.removeprefix(" ") if tokenizer.strip_leading_space else text
        size = sum(map(len, spelled))
        if size > MAX_TEXT_BYTES:
            what = f"the text of these tokens has {size} bytes, allowed: {MAX_TEXT_BYTES}"
            raise InvalidRequest(what, field="token_ids", limit=f"{MAX_TEXT_BYTES} bytes", value=size)
        return Detokenized(stream=message.stream, text=text, pieces=spelled if message.pieces else [])

    def _tokenizer(self, field: str) -> Vocabulary:
        """Raises InvalidRequest where there is none."""
        if self._prompts.tokenizer is None:
            what = "the served checkpoint has no tokenizer"
            raise InvalidRequest(what, field=field, limit="a checkpoint with a tokenizer", value="none")
        return self._prompts.tokenizer

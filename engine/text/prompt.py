"""Prompts as clients send them, made into token ids; and a reader for the tokens that follow them."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from cierzo.engine.checkpoint_file import require_file
from cierzo.engine.errors import CheckpointError, InvalidRequest
from cierzo.engine.messages import (
    ChatMessage,
    Generate,
    ImageChunk,
    ModelInfo,
    PromptImage,
    SamplingParams,
    Submit,
)
from cierzo.engine.text.chat import TOOLS_TEMPLATE, load_chat_template
from cierzo.engine.text.detok import Detokenizer
from cierzo.engine.text.image_tokens import Images
from cierzo.engine.text.masks import masked
from cierzo.engine.text.parts import PartsReader
from cierzo.engine.text.syntax import Syntax, syntax_of
from cierzo.engine.text.template_chat import TemplateChat
from cierzo.engine.text.tokenizer import Tokenizer, load_tokenizer
from cierzo.engine.text.tokenizer_config import image_token_ids, read_chat_templates
from cierzo.engine.text.vocabulary import TEKKEN_FILE, TOKENIZER_FILE, Chat, refuse_unfit, words_of

if TYPE_CHECKING:
    from cierzo.engine.text.tekken import TekkenVocabulary

PART_CHARS = 64  # a turn, or a call in it, takes a template as long as so many characters
TOOL_CHARS = 1024  # a tool whose schema is checked
WORD_CHARS = 16  # a text of its own takes a tokenizer as long as so many characters more
IMAGE_CHARS = 1024 * 1024  # an image is never decoded where short prompts are encoded
CALL_ID_CHARS = 9  # what every version of Mistral's templates takes
_ID_ALPHABET = string.ascii_letters + string.digits
Reader = Detokenizer | PartsReader
NO_IMAGES = Images()
CallLimit = Literal["many", "one", "none"]  # calls that an answer may hold


class Prompt(msgspec.Struct, frozen=True, gc=False):
    """A prompt that is encoded. `in_thinking`: it ends within a thought, which the answer goes on with. `images`:
    in the order of their tokens."""

    token_ids: list[int]
    in_thinking: bool = False
    images: list[PromptImage] = []


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """Tokenizer and chat template of what is served; either may be missing, then only `token_ids` (or no
    `messages`) can be asked. `other_templates`: names of chat templates where none is the default.
    `image_token_ids`: the tokens that stand for an image. `syntax`: how the model marks thoughts and calls; None if
    it marks nothing. `missing`: a sentence on what of the files cannot be used, or ""."""

    tokenizer: Tokenizer | TekkenVocabulary | None = None
    template: Chat | None = None
    other_templates: tuple[str, ...] = ()
    image_token_ids: frozenset[int] = frozenset()
    syntax: Syntax | None = None
    missing: str = ""

    @classmethod
    def load(cls, checkpoint_dir: Path, tokenizer: str = "auto", vocab_size: int | None = None) -> PromptEncoder:
        """Read tokenizer and chat template from a checkpoint's folder; raises CheckpointError.

        tokenizer: "mistral" reads tekken.json, "tokenizers" tokenizer.json, and each must be there; "auto" reads
        the first of them that is.
        vocab_size: of the model.
        """
        if reads_tekken(checkpoint_dir, tokenizer):
            from cierzo.engine.text.mistral import load_mistral  # takes half a second, and memory

            tekken, chat, missing = load_mistral(checkpoint_dir, vocab_size)
            images = image_token_ids(checkpoint_dir, tekken.special_ids)
            return cls(tekken, chat, (), images, syntax_of(tekken, None, tekken.version), missing)
        return cls._load_tokenizers(checkpoint_dir)

    @classmethod
    def _load_tokenizers(cls, checkpoint_dir: Path) -> PromptEncoder:
        tokenizer = load_tokenizer(checkpoint_dir)
        if tokenizer is None:
            return cls()
        template, sources = load_chat_template(checkpoint_dir), read_chat_templates(checkpoint_dir)
        images = image_token_ids(checkpoint_dir, tokenizer.special_ids)
        if template is None:
            return cls(tokenizer, None, tuple(sorted(sources)), images, syntax_of(tokenizer, None, None))
        with_tools = load_chat_template(checkpoint_dir, TOOLS_TEMPLATE) or template
        syntax = syntax_of(tokenizer, f"{template.source}\n{with_tools.source}", None)
        takes_calls = template.writes_calls or with_tools.writes_calls
        if syntax is not None and not takes_calls:
            # a turn that holds some could not be sent back; special tokens have no text that they could be
            syntax = syntax.without_calls(kept={*tokenizer.special_ids.values()})
            takes_calls = syntax is not None and syntax.marks_calls
        chat = TemplateChat(template, tokenizer, with_tools, takes_calls=takes_calls)
        return cls(tokenizer, chat, (), images, syntax)

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Special tokens, which have no text in an output, by how they are spelled."""
        return {} if self.tokenizer is None else self.tokenizer.special_ids

    @property
    def efforts(self) -> tuple[str, ...] | None:
        """The words that `reasoning_effort` may say; None where there are no conversations."""
        return None if self.template is None else self.template.efforts

    def unsafe_places(self) -> list[str]:
        """The fields of a conversation in which a client's text may become a control token, or is refused for it.
        Takes tens of milliseconds."""
        return self.template.unsafe_places() if isinstance(self.template, TemplateChat) else []

    def notes(self) -> list[str]:
        """Sentences for whoever serves this, in a server's log and of `cierzo info`. As slow as `unsafe_places`."""
        found, places = [self.missing] if self.missing else [], ", ".join(self.unsafe_places())
        text = "the chat template changes what it is given: a client can spell a control token, or is refused, in"
        return [*found, f"{text} {places}"] if places else found

    def encode(self, message: Generate, max_tokens: int | None = None, images: Images = NO_IMAGES) -> Prompt:
        """Encode the prompt; raises InvalidRequest, before it encodes, if a text cannot fit `max_tokens`. `images`:
        those of the message, decoded.

        Takes time in proportion to `weight`.
        """
        if message.token_ids is not None:
            return Prompt(message.token_ids, images=images.placed(message.token_ids))
        if self.tokenizer is None:
            what, field = "the served checkpoint has no tokenizer: send token_ids", _field(message)
            raise InvalidRequest(what, field=field, limit="token_ids", value=field)
        if message.text is not None:
            refuse_unfit(self.tokenizer, "text", message.text, max_tokens)
            if message.suffix is None:
                return Prompt(self.tokenizer.encode(message.text))
            refuse_unfit(self.tokenizer, "suffix", message.suffix, max_tokens)
            return Prompt(self.tokenizer.encode_middle(message.text, message.suffix))
        if self.template is None:
            named = f"default chat template, only {', '.join(self.other_templates)}"
            known = named if self.other_templates else "chat template"
            what = f"the served checkpoint has no {known}: send text"
            raise InvalidRequest(what, field="messages", limit="text, token_ids", value="messages")
        token_ids, in_thinking = self.template.encode(message, max_tokens, images)
        in_thinking = in_thinking and self.syntax is not None and self.syntax.marks_thinking
        return Prompt(token_ids, in_thinking, images.placed(token_ids))

    def max_text_bytes(self, max_tokens: int) -> int | None:
        """UTF-8 bytes of the longest text that fits so many tokens; None if only its reader can tell."""
        if self.tokenizer is None or self.tokenizer.lost_bytes or self.tokenizer.longest_token_bytes is None:
            return None
        return max_tokens * self.tokenizer.longest_token_bytes

    def reader(
        self,
        params: SamplingParams,
        *,
        apart: bool = False,
        in_thinking: bool = False,
        calls: CallLimit = "many",
        sample: int = 0,
        num_prompt_tokens: int = 0,
    ) -> Reader | None:
        """A reader of one sample's tokens; None without a tokenizer.

        apart: one that tells text, thoughts and calls apart, if the model marks them. in_thinking: the prompt ends
        within a thought. calls: with "none", what is spelled like a call is text; the token that opens one still
        does. The ids of calls depend on the last two, and on the seed.
        """
        if self.tokenizer is None:
            return None
        stop_tokens = {self.special_ids[text]: text for text in params.stop if text in self.special_ids}
        if not apart or self.syntax is None:
            return Detokenizer(self.tokenizer, params.stop, params.min_tokens, stop_tokens)
        return PartsReader(
            self.tokenizer,
            self.syntax.without_spelled_calls() if calls == "none" else self.syntax,
            params.stop,
            params.min_tokens,
            stop_tokens,
            in_thinking=in_thinking,
            parallel=calls != "one",
            call_id=partial(call_id, params.seed, num_prompt_tokens, sample),
        )

    def call_limit(self, message: Generate) -> CallLimit:
        """How many calls the answer to a message may hold: none where its client wants none, or offers no tools;
        one where the client wants one, or the chat template writes no more in a turn."""
        if message.tool_choice == "none" or (message.messages is not None and not message.tools):
            return "none"
        takes_one = isinstance(self.template, TemplateChat) and self.template.takes_one_call
        return "one" if takes_one or not message.parallel_tool_calls else "many"

    def masked(self, submit: Submit, message: Generate, model: ModelInfo, *, in_thinking: bool) -> Submit:
        """`submit` with what its message says that a token may be; see masks.py. Raises InvalidRequest."""
        return masked(submit, message, self.tokenizer, self.syntax, model, in_thinking=in_thinking)

    def weight(self, message: Generate) -> int:
        """The work to encode a message, in characters of text that take as long. Token ids take none."""
        weight = len(message.output_token_ids) + IMAGE_CHARS * len(message.images)
        weight += sum(4 * (WORD_CHARS + len(word)) for word in message.sampling.bad_words)
        if message.grammar is not None:
            value = message.grammar.value
            weight += len(value) if isinstance(value, str) else sum(WORD_CHARS + len(text) for text in value)
        if message.text is not None:
            return weight + len(message.text) + len(message.suffix or "")
        if message.tools:
            weight += TOOL_CHARS * len(message.tools) + len(msgspec.msgpack.encode(message.tools))
        for turn in message.messages or ():
            weight += PART_CHARS + content_chars(turn) + len(turn.reasoning)
            weight += sum(PART_CHARS + len(call.arguments) for call in turn.tool_calls)
        return weight


def call_id(seed: int | None, num_prompt_tokens: int, sample: int, number: int) -> str:
    """The id of a call: the same whenever the generation is repeated or resumed, another one in each turn of a
    conversation, whose prompts get longer."""
    source = f"{seed} {num_prompt_tokens} {sample} {number}".encode()
    rest, chars = int.from_bytes(blake2b(source, digest_size=8).digest(), "big"), ""
    for _ in range(CALL_ID_CHARS):
        rest, place = divmod(rest, len(_ID_ALPHABET))
        chars += _ID_ALPHABET[place]
    return chars


def reads_tekken(checkpoint_dir: Path, tokenizer: str) -> bool:
    """Whether the words of a folder are those of its tekken.json, by this setting. Raises CheckpointError where
    the setting names a tokenizer whose file is not there, and where something else than a file is."""
    files = {"mistral": TEKKEN_FILE, "tokenizers": TOKENIZER_FILE}
    for file in files.values():
        require_file(checkpoint_dir / file)
    there = [name for name, file in files.items() if (checkpoint_dir / file).is_file()]
    if tokenizer in files and tokenizer not in there:
        limit = " or ".join(("auto", *there))
        raise CheckpointError(
            f"tokenizer is {tokenizer}, which reads {files[tokenizer]}, and {checkpoint_dir} has none; it may be "
            f"{limit}",
            field="tokenizer",
            limit=limit,
            value=tokenizer,
        )
    return tokenizer != "tokenizers" and "mistral" in there


def content_chars(turn: ChatMessage) -> int:
    """Characters of a turn's content."""
    if isinstance(turn.content, str):
        return len(turn.content)
    return sum(
        PART_CHARS + (IMAGE_CHARS if isinstance(chunk, ImageChunk) else len(words_of(chunk)))
        for chunk in turn.content
    )


def _field(message: Generate) -> str:
    return "text" if message.text is not None else "messages"

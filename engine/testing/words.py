"""A model's words, made up: ids are bytes, a few more are control tokens; and what such a model calls itself.

It marks its thoughts and calls as Mistral Small 4 does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from cierzo.engine.messages import ModelInfo, VisionInfo
from cierzo.engine.text.chat import ChatTemplate
from cierzo.engine.text.image_tokens import MEAN, STD
from cierzo.engine.text.prompt import PromptEncoder
from cierzo.engine.text.syntax import syntax_of
from cierzo.engine.text.template_chat import TemplateChat
from cierzo.engine.text.tokenizer import _BYTE_OF, Tokenizer
from cierzo.engine.text.tokenizer_config import TokenizerConfig

BOS, EOS, VOCAB = 256, 257, 300
MARKERS = ("[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]")
ID_OF = {marker: 258 + place for place, marker in enumerate(MARKERS)}
IMAGE_WORDS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")  # behind the markers, of a model that takes images
VISION = VisionInfo(14, 2, 1540, MEAN, STD, *(258 + len(MARKERS) + place for place in range(len(IMAGE_WORDS))))
TEMPLATE = (
    "{% if tools %}{% endif %}"  # reads them, and writes none
    "{% for m in messages %}[{{ m.role }}]{% if m.reasoning %}[THINK]{{ m.reasoning }}[/THINK]{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.function.name }}[ARGS]"
    "{{ c.function.arguments }}{% endfor %}{% endfor %}"
    "{% if reasoning_effort %}({{ reasoning_effort }}){% endif %}"
)
PARTS = (  # of a turn, where it may have images
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }}{% else %}[IMG]{% endif %}{% endfor %}{% endif %}"
)


def bytes_and(special: Sequence[str]) -> tokenizers.Tokenizer:
    """Ids 0..255 are bytes, and the next ones these special tokens."""
    inner = tokenizers.Tokenizer(models.BPE(_BYTE_OF, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([*special])
    return inner


def marked_level(more: Sequence[str] = ()) -> tokenizers.Tokenizer:
    """Ids 0 to 255 are bytes, 256 and 257 begin and end a text, the next ones are the markers, and then `more`."""
    return bytes_and(("<s>", "</s>", *MARKERS, *more))


def marked_tokenizer(more: Sequence[str] = ()) -> Tokenizer:
    """Wrap these words as our own tokenizer."""
    eos_token = tokenizers.AddedToken("</s>", special=True)
    return Tokenizer(marked_level(more), TokenizerConfig(named={"eos_token": eos_token}))


def marked_prompts(template: str = TEMPLATE) -> PromptEncoder:
    """Tokenizer, template and syntax of that model."""
    tokenizer = marked_tokenizer()
    chat = TemplateChat(ChatTemplate(template), tokenizer)
    return PromptEncoder(tokenizer, chat, syntax=syntax_of(tokenizer, None, None))


def seeing_prompts() -> PromptEncoder:
    """Tokenizer, template and syntax of a model that takes images, as VISION says."""
    tokenizer = marked_tokenizer(IMAGE_WORDS)
    chat = TemplateChat(ChatTemplate(TEMPLATE.replace("{{ m.content }}", PARTS)), tokenizer)
    return PromptEncoder(
        tokenizer,
        chat,
        image_token_ids=frozenset({VISION.image_token_id}),
        syntax=syntax_of(tokenizer, None, None),
    )


def fake_model(**changed: Any) -> ModelInfo:
    """Describe the model of a fake core, but for some fields."""
    model = ModelInfo(
        stream=0,
        name="fake",
        architecture="none",
        dtype="float32",
        device="cpu",
        vocab_size=VOCAB,
        max_model_len=4096,
        block_tokens=16,
        num_blocks=64,
        eos_token_ids=[EOS],
        has_tokenizer=True,
        has_chat_template=True,
    )
    return msgspec.structs.replace(model, **changed)

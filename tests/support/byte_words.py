"""A tokenizer whose ids are bytes, and a chat template that names the roles."""

from __future__ import annotations

import tokenizers
from tokenizers import processors

from cierzo.engine.testing.words import BOS, bytes_and
from cierzo.engine.text.chat import ChatTemplate
from cierzo.engine.text.prompt import PromptEncoder
from cierzo.engine.text.template_chat import TemplateChat
from cierzo.engine.text.tokenizer import Tokenizer
from cierzo.engine.text.tokenizer_config import TokenizerConfig

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if reasoning_effort %}({{ reasoning_effort }}){% endif %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_level() -> tokenizers.Tokenizer:
    """Ids 0..255 are bytes, 256 and 257 begin and end a text, 258 is an added word with a space in it."""
    inner = bytes_and(("<s>", "</s>"))
    inner.add_tokens(["<two words>"])
    inner.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", BOS)])
    return inner


def byte_tokenizer() -> Tokenizer:
    """The same as ours."""
    eos_token = tokenizers.AddedToken("</s>", special=True)
    return Tokenizer(byte_level(), TokenizerConfig(named={"eos_token": eos_token}))


def byte_prompts(tokenizer: Tokenizer) -> PromptEncoder:
    """Prompts of conversations too."""
    return PromptEncoder(tokenizer, TemplateChat(ChatTemplate(TEMPLATE, "<s>", "</s>"), tokenizer))

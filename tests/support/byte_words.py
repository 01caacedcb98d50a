"""A tokenizer whose ids are bytes, and a chat template that names the roles."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers
from fake_core import BOS
from tokenizers import decoders, models, pre_tokenizers, processors

from cierzo.engine.text.chat import ChatTemplate
from cierzo.engine.text.prompt import PromptEncoder
from cierzo.engine.text.template_chat import TemplateChat
from cierzo.engine.text.tokenizer import _BYTE_OF, Tokenizer
from cierzo.engine.text.tokenizer_config import TokenizerConfig

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if reasoning_effort %}({{ reasoning_effort }}){% endif %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def bytes_and(special: Sequence[str]) -> tokenizers.Tokenizer:
    """Ids 0..255 are bytes, and the next ones these special tokens."""
    inner = tokenizers.Tokenizer(models.BPE(_BYTE_OF, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([*special])
    return inner


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

"""A model that marks its thoughts and calls as Mistral Small 4 does, over a tokenizer whose ids are bytes."""

from __future__ import annotations

import tokenizers
from byte_words import bytes_and
from fake_core import EOS

from cierzo.engine.messages import Part
from cierzo.engine.text.chat import ChatTemplate
from cierzo.engine.text.prompt import PromptEncoder
from cierzo.engine.text.syntax import syntax_of
from cierzo.engine.text.template_chat import TemplateChat
from cierzo.engine.text.tokenizer import Tokenizer
from cierzo.engine.text.tokenizer_config import TokenizerConfig

MARKERS = ("[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]")
ID_OF = {marker: 258 + place for place, marker in enumerate(MARKERS)}
TEMPLATE = (
    "{% if tools %}{% endif %}"  # reads them, and writes none
    "{% for m in messages %}[{{ m.role }}]{% if m.reasoning %}[THINK]{{ m.reasoning }}[/THINK]{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.function.name }}[ARGS]"
    "{{ c.function.arguments }}{% endfor %}{% endfor %}"
)


def marked_level() -> tokenizers.Tokenizer:
    """Ids 0 to 255 are bytes, 256 and 257 begin and end a text, the next ones are the markers."""
    return bytes_and(("<s>", "</s>", *MARKERS))


def marked_tokenizer() -> Tokenizer:
    """The same as ours."""
    eos_token = tokenizers.AddedToken("</s>", special=True)
    return Tokenizer(marked_level(), TokenizerConfig(named={"eos_token": eos_token}))


def marked_prompts() -> PromptEncoder:
    """Tokenizer, template and syntax of that model."""
    tokenizer = marked_tokenizer()
    chat = TemplateChat(ChatTemplate(TEMPLATE), tokenizer)
    return PromptEncoder(tokenizer, chat, syntax=syntax_of(tokenizer, None, None))


def ids(text: str) -> list[int]:
    """Token ids of a text with markers in it."""
    found: list[int] = []
    while text:
        marker = next((each for each in MARKERS if text.startswith(each)), None)
        found += [ID_OF[marker]] if marker else text[0].encode()
        text = text[len(marker) if marker else 1 :]
    return found


def bare(parts: list[Part]) -> list[tuple[str, str, str]]:
    """Kind, name and text of each part that has one."""
    return [(part.kind, part.name, part.text) for part in parts if part.text or part.name]


SAID = (
    "[THINK]let me see €[/THINK]It blows. "
    '[TOOL_CALLS]wind[ARGS]{"at": "Zaragoza"}[TOOL_CALLS]rain[ARGS]{"in":  [1, 2]}'
)
TOKENS = [*ids(SAID), EOS]
RIGHT = [
    ("thinking", "", "let me see €"),
    ("text", "", "It blows. "),
    ("call", "wind", '{"at": "Zaragoza"}'),
    ("call", "rain", '{"in":  [1, 2]}'),
]

"""Folders of small tokenizers and chat templates, in the manner of families of models."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from cierzo.engine.messages import ChatMessage, Generate, Tool, ToolCall
from cierzo.engine.text.prompt import PromptEncoder
from cierzo.engine.text.tokenizer import _BYTE_OF

SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<|user|>", "<|end|>")
NOT_SPECIAL = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<city>")
PLAIN = ("    ", "<h1>")  # added tokens that are text
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FAMILIES = {
    "ChatML": "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "trimming": "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}",
    "thinking": """
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}# Tools
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools> Answer within <tool_call></tool_call>.<|im_end|>
{% endif %}
{%- for m in messages %}
    {%- set content = m.content %}
    {%- if m.role == 'assistant' %}
        {%- set thought = m.reasoning_content if m.reasoning_content is string else '' %}
        {%- if not thought and '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.last or thought %}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}
        {{- content.lstrip('\n') }}
        {%- for call in m.tool_calls or [] %}
            {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{ '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %}{{ '<|im_start|>user\n<result>\n' + content + '\n</result><|im_end|>\n' }}
    {%- elif m.role != 'system' or not tools %}{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}
    {%- else %}{{ '<think>\n' }}{% endif %}
{%- endif %}""",
    "instructions": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}"
    "{{ eos_token }}{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
    "roles as tokens": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "arguments as tags": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{% for k, v in c.function.arguments.items() %}"
    "{{ '<' ~ k ~ '>' ~ v ~ '</' ~ k ~ '>' }}{% endfor %}"
    "</tool_call>{% endfor %}<|im_end|>{% endfor %}{% for t in tools or [] %}{% for k in t.function.parameters %}"
    "{{ '<' ~ k ~ '>' }}{% endfor %}{% endfor %}",
    "escaping": "{% for m in messages %}<|im_start|>{{ m.content | tojson(ensure_ascii=true) }}{{ m }}<|im_end|>"
    "{% endfor %}",
}


def byte_level() -> tokenizers.Tokenizer:
    """Bytes, each a token, and control tokens of every kind."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *_BYTE_OF))}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", vocabulary["<s>"])])
    return _with_tokens(inner)


def sentence_piece(*, first_alone: bool) -> tokenizers.Tokenizer:
    """Pieces with a mark for spaces, put before each text between special tokens, or the first one alone."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a", "\u2581b"]
    merges = [("\u2581", "a"), ("\u2581", "b")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    if first_alone:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_tokens(inner)


def _with_tokens(inner: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL[:-2]])
    swallowing = AddedToken("<|user|>", special=True, normalized=False, rstrip=True, lstrip=True)
    inner.add_special_tokens([swallowing, AddedToken("<|end|>", special=True, normalized=False, single_word=True)])
    inner.add_tokens([AddedToken(token, special=False, normalized=False) for token in (*NOT_SPECIAL, *PLAIN)])
    return inner


TOKENIZERS = {
    "bytes": byte_level(),
    "pieces": sentence_piece(first_alone=False),
    "pieces, first": sentence_piece(first_alone=True),
}


def write_folder(folder: Path, tokenizer: str, template: str | None) -> Path:
    """A checkpoint's folder, but for its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    TOKENIZERS[tokenizer].save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **ROLES}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@lru_cache
def folder(tokenizer: str, family: str) -> Path:
    """A folder of this kind, made once."""
    return write_folder(Path(mkdtemp()), tokenizer, FAMILIES[family])


@lru_cache
def ours(tokenizer: str, family: str) -> PromptEncoder:
    """The encoder of prompts that is read from it, made once."""
    return PromptEncoder.load(folder(tokenizer, family))


def message(turns: list[dict], tools: list[dict] = (), **fields) -> Generate:
    """The request for turns and tools as transformers takes them."""
    made = []
    for turn in turns:
        calls = [
            ToolCall(name=call["function"]["name"], arguments=json.dumps(call["function"]["arguments"]))
            for call in turn.get("tool_calls", ())
        ]
        reasoning = turn.get("reasoning", "")
        made.append(ChatMessage(role=turn["role"], content=turn["content"], reasoning=reasoning, tool_calls=calls))
    return Generate(stream=0, messages=made, tools=[Tool(**tool["function"]) for tool in tools], **fields)

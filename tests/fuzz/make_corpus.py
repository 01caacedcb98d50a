"""Writes the first entries of the corpus: every message of a client, whole and in small variations.

    PYTHONPATH=tests .venv/bin/python -m fuzz.make_corpus

Findings are added by hand or by `make fuzz`; they stay.
"""

from __future__ import annotations

import base64
from typing import Any

import msgspec
from support.image_files import picture

from fuzz.targets import CORPUS

_encode = msgspec.msgpack.encode

HELLO: dict[str, Any] = {
    "type": "hello",
    "magic": "cierzo",
    "version": 3,
    "client": "fuzz",
    "features": ["accounting", "attach", "credit", "keepalive", "resume"],
}
OLD_HELLO = {"type": "hello", "magic": "cierzo", "version": 2}
SAMPLING = {"max_tokens": 5, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "n": 2, "stop": ["ab"], "seed": 3}
GENERATE: dict[str, Any] = {"type": "generate", "stream": 1, "token_ids": [1, 2, 3], "sampling": {"max_tokens": 3}}
SCHEMA = '{"type": "object", "properties": {"a": {"enum": [1, "x"]}}, "required": ["a"]}'
LARK = 'start: item ("," item)*\nitem: /[a-z]+/ | "(" start ")"'
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{}", "id": "1"}]},
    {"role": "tool", "content": "x", "tool_call_id": "1"},
]
DOT = picture(1, 1)
URL = f"data:image/png;base64,{base64.b64encode(DOT).decode()}"
SEEN = [{"role": "user", "content": [{"type": "image", "digest": bytes(16)}, {"type": "image", "url": URL}]}]
FRAMES: dict[str, dict[str, Any]] = {
    "hello": HELLO,
    "hello-2": OLD_HELLO,
    "generate-ids": GENERATE,
    "generate-text": {"type": "generate", "stream": 2, "text": "hello", "sampling": SAMPLING, "deadline_s": 2.5},
    "generate-chat": {"type": "generate", "stream": 3, "messages": CHAT, "reasoning_effort": "low"},
    "generate-resumed": {**GENERATE, "output_token_ids": [4, 5], "priority": -3, "deltas": False},
    "generate-bias": {**GENERATE, "sampling": {"logit_bias": {5: 1.5}, "logprobs": 2, "stop_token_ids": [9]}},
    "generate-key": {**GENERATE, "idempotency_key": "a key"},
    "generate-attached": {"type": "generate", "stream": 4, "attached": "token_ids"},
    "attach": {"type": "attach", "stream": 4, "data": _encode([1, 2, 3])},
    "resume": {"type": "resume", "stream": 5, "request_id": "0" * 32, "received": [1, 2]},
    "cancel": {"type": "cancel", "stream": 1},
    "cancel-request": {"type": "cancel_request", "stream": 6, "request_id": "f" * 32},
    "credit": {"type": "credit", "stream": 1, "bytes": 1000},
    "ping": {"type": "ping", "stream": 7},
    "pong": {"type": "pong", "stream": 7},
    "health": {"type": "health", "stream": 8},
    "stats": {"type": "stats", "stream": 9},
    "model": {"type": "model", "stream": 10},
    "drain-undo": {"type": "drain", "stream": 11, "undo": True},
    "hello-words": {**HELLO, "features": ["tokenize"]},
    "tokenize": {"type": "tokenize", "stream": 12, "text": "a</s>", "control_tokens": True},
    "tokenize-chat": {"type": "tokenize", "stream": 13, "messages": CHAT},
    "detokenize": {"type": "detokenize", "stream": 14, "token_ids": [*range(300)] * 10, "pieces": True},
    "tokenizer": {"type": "tokenizer", "stream": 15},
    "hello-grammars": {**HELLO, "features": ["grammars", "parts"]},
    "generate-schema": {**GENERATE, "stream": 16, "grammar": {"kind": "json_schema", "value": SCHEMA}},
    "generate-regex": {**GENERATE, "stream": 17, "grammar": {"kind": "regex", "value": r"[a-c]{1,3}(\d|x)*"}},
    "generate-choice": {**GENERATE, "stream": 18, "grammar": {"kind": "choice", "value": ["a", "b\n", "ñ"]}},
    "generate-lark": {**GENERATE, "stream": 19, "grammar": {"kind": "lark", "value": LARK}},
    "hello-images": {**HELLO, "features": ["attach", "images", "parts"]},
    "generate-images": {"type": "generate", "stream": 20, "token_ids": [2, 125, 127, 3], "images": [DOT]},
    "generate-parts": {"type": "generate", "stream": 21, "messages": SEEN, "images": [DOT]},
    "attach-image": {"type": "attach", "stream": 22, "data": DOT, "image": 0},
    "attach-image-1": {"type": "attach", "stream": 22, "data": DOT[:40], "image": 1},
    "generate-attached-images": {"type": "generate", "stream": 22, "token_ids": [2, 125, 127, 125, 127]},
}
SEQUENCES = {
    "asks": ["hello", "ping", "health", "stats", "model"],
    "generates": ["hello", "generate-ids", "generate-text", "cancel"],
    "generates-2": ["hello-2", "generate-ids", "generate-text", "ping"],
    "attaches": ["hello", "attach", "generate-attached", "ping"],
    "resumes": ["hello", "generate-key", "generate-key", "resume", "cancel-request", "credit"],
    "words": ["hello-words", "tokenize", "tokenize-chat", "detokenize", "detokenize", "tokenizer"],
    "holds": ["hello-grammars", "generate-schema", "generate-regex", "generate-choice", "generate-lark", "ping"],
    "sees": ["hello-images", "attach-image", "attach-image-1", "generate-attached-images", "generate-images"],
    "twice": ["hello", "hello"],
    "no-hello": ["ping"],
}
ANSWERS = {  # a byte for the syntax, and text in which bytes from 0xF8 on stand for its markers
    "mistral": b'\x00\xf8hm\xf9ok \xfaget\xfb{"x": [1, "\xc3\xa9"]}\xfag\xfc123456789\xfb{}',
    "mistral-list": b'\x00\xfa [{"name": "f", "arguments": {"x": "}"}, "id": "x"}, {"arguments": {}, "name": "g"}]',
    "magistral": b"\x01<think>hm</think>\n\xf8f\xf9{}",
    "tags": b'\x02<think>a<b</think>\n<tool_call>\n{"name": "f", "arguments": {"a": [true, -1.5e3]}}\n</tool_call>',
    "tag-tokens": b'\x03\xf8hm\xf9\n\xfa\n{"name": "f", "arguments": {"b": "\\u00e9"}}\n\xfb\n\xfax\xfb',
    "llama": b'\x04 {"name": "f", "parameters": {}}; {"type": "function", "name": "g", "parameters": {"x": 1}}',
    "llama-json": b'\x04{"name": "Ann", "age": 3}',
}


def main() -> None:
    """Write the files that are not there."""
    for name, message in FRAMES.items():
        _write(f"frames/{name}", _encode(message))
    for name, names in SEQUENCES.items():
        bodies = [_encode(FRAMES[each]) for each in names]
        _write(f"sequences/{name}", b"".join(len(body).to_bytes(4, "big") + body for body in bodies))
    for name, answer in ANSWERS.items():
        _write(f"answers/{name}", answer)
    _write("sequences/http", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    _write("sequences/tls", bytes.fromhex("160301020001000001fc0303") + bytes(range(64)))
    hello = _encode(HELLO)
    _write("sequences/empty-frames", len(hello).to_bytes(4, "big") + hello + bytes(64))


def _write(name: str, data: bytes) -> None:
    path = CORPUS / f"{name}.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_bytes(data)


if __name__ == "__main__":
    main()

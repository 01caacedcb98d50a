"""/tokenize, /detokenize and /tokenizer_info at the door."""

from __future__ import annotations

import asyncio

from cierzo.engine.frontend.encoders import Late
from cierzo.engine.testing.local_encoders import LocalEncoders


def test_tokens_of_a_text_and_back(either):
    house = either("x")
    told = house.post("/tokenize", {"model": "fake", "prompt": "Hi", "return_token_strs": True}).json()
    assert (told["count"], told["tokens"], told["token_strs"]) == (2, [72, 105], ["H", "i"])
    assert house.post("/detokenize", {"model": "fake", "tokens": [72, 105]}).json() == {"prompt": "Hi"}
    assert house.get("/tokenizer_info").json()["eos_token"] == "</s>"


def test_tokens_of_a_conversation(either):
    messages = [{"role": "user", "content": "Hi"}]
    told = either("x").post("/tokenize", {"messages": messages}).json()
    assert bytes(told["tokens"]) == b"[user]Hi"


def test_bodies_about_words_are_short(either):
    house = either("x")
    refused = house.post("/tokenize", {"prompt": "x" * 2_000_000})
    assert (refused.status_code, refused.json()["error"]["limit"]) == (413, str(1024 * 1024))
    assert refused.json()["error"]["message"].endswith("bytes, allowed at this path: 1048576")  # no setting


def test_a_text_that_no_process_came_to_is_to_be_sent_again(either, monkeypatch):
    """The server itself says when."""

    def word(self, *given):
        loop = asyncio.get_running_loop()
        answer = loop.create_future()
        loop.call_soon(answer.set_exception, Late())
        return answer

    monkeypatch.setattr(LocalEncoders, "word", word)
    refused = either("x", retry_after_s=7.0).post("/tokenize", {"prompt": "x" * 3000})
    assert (refused.status_code, refused.json()["error"]["param"]) == (429, "encoders")
    assert refused.headers["retry-after"] == "7"

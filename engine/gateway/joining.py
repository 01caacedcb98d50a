"""A whole answer, put together as it is made."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from cierzo.engine.errors import CierzoError, InvalidRequest
from cierzo.engine.frontend.generation import Generation
from cierzo.engine.gateway import answers
from cierzo.engine.gateway.asked import in_body
from cierzo.engine.gateway.bodies import Request
from cierzo.engine.gateway.call import ANYBODY, RETRY_AFTER_S, Call
from cierzo.engine.gateway.errors import require_planned
from cierzo.engine.gateway.house import House
from cierzo.engine.gateway.token_words import chat_entry, prompt_entry
from cierzo.engine.messages import Delta, Final

TURN_BYTES = 32 * 1024  # of log-probabilities, written in one turn of the loop


class Counted:
    """Bytes of an answer that is put together, which count until it is closed."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Count so many more. Raises InvalidRequest for more than one answer may have, and Overloaded for more than
        all may."""
        most, joined = self._house.config.max_whole_bytes, self._house.joined
        total = self._num_bytes + num_bytes
        if total > most:
            what = f"the answer is longer than max_whole_bytes, {most}: ask for a stream, or for fewer tokens in it"
            raise InvalidRequest(what, field="max_whole_bytes", limit=most, value=total)
        joined.require(ANYBODY, num_bytes, RETRY_AFTER_S)
        joined.add(ANYBODY, num_bytes)
        self._num_bytes = total

    def close(self) -> None:
        """Count it no more."""
        self._house.joined.add(ANYBODY, -self._num_bytes)
        self._num_bytes = 0


class Prompt(NamedTuple):
    """A prompt that comes before its answer: its text, and its first token, if its log-probabilities are told."""

    text: str = ""
    first_token: int | None = None


class Joining:
    """An answer to one prompt, put together as it is made. counted: where its bytes count."""

    def __init__(
        self, house: House, call: Call, request: Request, is_chat: bool, prompt: Prompt, counted: Counted
    ) -> None:
        self.thought_tokens = self._num_new = 0
        self._house = house
        self._call = call
        self._asked = request.asked
        self._is_chat = is_chat
        self._prompt = prompt
        self._words = words = house.words(request.asked.as_token_ids)
        self._counted = counted
        self._generation: Generation | None = None
        self._entries = [bytearray() for _ in range(request.num_samples)]
        offset = len(prompt.text)
        self._legacy = [answers.Legacy(words, offset) for _ in range(request.num_samples)]
        self._before = answers.Legacy(words)
        if prompt.first_token is not None:
            self._before.begin(prompt.first_token, prompt.text)
        self._scores = bytearray()  # of a prompt that does not come before its answer

    async def join(self, generation: Generation) -> Final:
        """Wait for the whole answer. Raises the CierzoError that ended it."""
        self._generation = generation
        self._counted.add(len(self._prompt.text) * len(self._entries))  # each sample repeats it
        try:
            while deltas := await generation.next_batch():
                await self._words.learn_all(self._call.engine, deltas)
                for delta in deltas:
                    self._add(delta)
                    if self._num_new > TURN_BYTES:  # enough for one turn of the loop
                        self._num_new = 0
                        await asyncio.sleep(0)
            final = generation.final
        except CierzoError as error:
            raise in_body(error, self._asked) from None
        require_planned(final)
        return final

    def _add(self, delta: Delta) -> None:
        words, num_bytes = self._words, len(answers.text_of(delta.parts) or delta.text)
        if delta.prompt_logprobs and self._prompt.first_token is not None:
            num_bytes += len(self._legacy) * self._before.add(delta.prompt_logprobs)  # each sample repeats it
        elif delta.prompt_logprobs:
            num_bytes += _extend(self._scores, [prompt_entry(words, entry) for entry in delta.prompt_logprobs])
        elif delta.logprobs and self._is_chat:
            entries = self._entries[delta.sample]
            num_bytes += _extend(entries, [chat_entry(words, entry) for entry in delta.logprobs])
        elif delta.logprobs:
            num_bytes += self._legacy[delta.sample].add(delta.logprobs)
        self._num_new += num_bytes
        self._counted.add(num_bytes)

    @property
    def prompt_logprobs(self) -> list[answers.Piece]:
        """Log-probabilities of the prompt, in JSON, where they are told beside the answer; else nothing."""
        if self._asked.prompt_logprobs is None or self._asked.echo:
            return []
        return [b"[", *answers.listed(b"null,", self._scores), b"]"]

    def choices(self, first_index: int, final: Final) -> list[list[answers.Piece]]:
        """The choices that the samples are, each in pieces."""
        assert self._generation is not None
        told = []
        for end in final.samples:
            answer, index = self._generation.answer(end.sample), first_index + end.sample
            if self._is_chat:
                self.thought_tokens += answers.thought_tokens([answer])
                entries = self._entries[end.sample]
                told.append(answers.chat_choice(index, answer, end, self._house.config.reasoning_format, entries))
            else:
                has_some = self._asked.logprobs is not None or self._prompt.first_token is not None
                legacy = answers.Legacy(self._words) if self._asked.drops_output else self._legacy[end.sample]
                logprobs = legacy.pieces(self._before) if has_some else []
                text = self._prompt.text + ("" if self._asked.drops_output else answers.text_of(answer.parts))
                told.append(answers.completion_choice(index, text, end, logprobs, self.prompt_logprobs))
        return told


def _extend(entries: bytearray, more: list[bytes]) -> int:
    """Append entries, as `answers.listed` wants them; the bytes that they are."""
    told = b",".join([*more, b""])
    entries += told
    return len(told)

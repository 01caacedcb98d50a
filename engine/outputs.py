"""Answers of `LLM`: the samples that a prompt gave, whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from cierzo.engine.frontend.answer import as_turn, tool_calls
from cierzo.engine.messages import ChatMessage, EndReason, Part, TokenLogprobs, ToolCall, Usage


@dataclass(frozen=True, slots=True)
class SampleOutput:
    """A sample: one answer to a prompt. `stop` is the stop string or token id that ended it, if any; `text` leaves
    the string out.

    `parts`: text, thoughts and calls of tools in order, where the model marks them; else all is text. `text` is
    that of the text alone, and empty without a tokenizer; `broken_calls` are the numbers of calls whose arguments
    are no JSON object, or whose name no tool can have.
    `logprobs` is None unless asked for, else one entry per token, of which each part has its
    `num_tokens`. `message` says why an answer failed; `incomplete`, that it ended before its grammar did.
    """

    token_ids: list[int]
    text: str
    finish_reason: EndReason
    logprobs: list[TokenLogprobs] | None
    stop: str | int | None
    message: str
    parts: list[Part] = field(default_factory=list)
    broken_calls: list[int] = field(default_factory=list)
    incomplete: bool = False

    @property
    def thinking(self) -> str:
        """The model's thoughts."""
        return "".join(part.text for part in self.parts if part.kind == "thinking")

    @property
    def tool_calls(self) -> list[ToolCall]:
        """Calls that the model makes, whole ones alone: with a name, and arguments that are a JSON object."""
        return tool_calls(self.parts, self.broken_calls)

    @property
    def turn(self) -> ChatMessage:
        """The assistant's turn that says the same, without broken calls, for the next `chat`. It may be empty."""
        return as_turn(self.parts, self.broken_calls)


@dataclass(frozen=True, slots=True)
class Output:
    """The samples that one prompt gave, and their cost together. `seed` repeats them.

    `prompt_logprobs`, if asked for: an entry for each of the prompt's tokens from the second on, as nothing comes
    before the first; fewer of a prompt that failed.
    """

    prompt_token_ids: list[int]
    samples: list[SampleOutput]
    usage: Usage
    seed: int
    prompt_logprobs: list[TokenLogprobs] | None = None

    @property
    def token_ids(self) -> list[int]:
        """Tokens of sample 0."""
        return self.samples[0].token_ids

    @property
    def text(self) -> str:
        """Text of sample 0."""
        return self.samples[0].text

    @property
    def thinking(self) -> str:
        """Thoughts of sample 0."""
        return self.samples[0].thinking

    @property
    def tool_calls(self) -> list[ToolCall]:
        """Whole calls of sample 0."""
        return self.samples[0].tool_calls

    @property
    def parts(self) -> list[Part]:
        """Parts of sample 0."""
        return self.samples[0].parts

    @property
    def turn(self) -> ChatMessage:
        """The assistant's turn that sample 0 is."""
        return self.samples[0].turn

    @property
    def finish_reason(self) -> EndReason:
        """Why sample 0 ended."""
        return self.samples[0].finish_reason

    @property
    def broken_calls(self) -> list[int]:
        """Numbers of the calls of sample 0 that are none."""
        return self.samples[0].broken_calls

    @property
    def incomplete(self) -> bool:
        """Whether sample 0 ended before its grammar did."""
        return self.samples[0].incomplete

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        """Log-probabilities of sample 0."""
        return self.samples[0].logprobs

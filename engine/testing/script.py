"""The part of a fake server that a test writes: who is answered what, who is refused, whose connection is cut."""

from __future__ import annotations

import inspect
import json
import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import msgspec

from cierzo.engine.errors import CierzoError, InvalidRequest, refusal
from cierzo.engine.messages import Generate, ModelInfo, Submit, TextChunk
from cierzo.engine.testing.words import EOS, ID_OF, VOCAB
from cierzo.engine.text.image_tokens import Images
from cierzo.engine.text.prompt import NO_IMAGES, Prompt, PromptEncoder

ANSWER = "a text, token ids, a FakeAnswer or a CierzoError"
ANSWERS = f"{ANSWER}, a list of these, a mapping from prompts to these, or a function"
REFUSED = "refused by the fake server, as it was told"


class FakeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """An answer of a thought, a text and calls of tools: pairs of a name and arguments, a mapping or JSON."""

    text: str = ""
    thinking: str = ""
    calls: Sequence[tuple[str, Mapping[str, Any] | str]] = ()


Answer = str | Sequence[int] | FakeAnswer | CierzoError
Answers = Answer | Sequence[Answer] | Mapping[Any, Answer] | Callable[[Generate], Answer]


class Scripted(Submit, frozen=True, kw_only=True, tag="submit"):
    """A request whose output is known: `tokens`, from the first one on."""

    tokens: list[int]


@dataclass(slots=True)
class _Refusal:
    """An order to refuse `left` more of the requests that `fits` is true of."""

    error: CierzoError
    left: float
    fits: Callable[[Generate], object]


class Script:
    """Orders, from any thread, and what follows from them for a request."""

    def __init__(self, answers: Answers) -> None:
        self.requests: list[Generate] = []
        self.resets: deque[int] = deque()  # of the next streams, after how many deltas
        self._answer = _chooser(answers)
        self._refusals: list[_Refusal] = []
        self._lock = threading.Lock()

    def refuse(
        self,
        error: type[CierzoError] | CierzoError,
        times: int | None,
        when: Callable[[Generate], object] | None,
        retry_after_s: float | None,
    ) -> None:
        """Have requests refused; `FakeServer.refuse` says how."""
        if inspect.isclass(error) and issubclass(error, CierzoError):
            error = error(REFUSED)
        if not isinstance(error, CierzoError):
            raise refusal("error", "a CierzoError, or a class of them", error)
        if times is not None and times < 1:
            raise refusal("times", "at least 1, or None for all", times)
        if when is not None and not callable(when):
            raise refusal("when", "a function of the Generate message", when)
        if retry_after_s is not None:
            error.retry_after_s = retry_after_s
        with self._lock:
            self._refusals.append(_Refusal(error, math.inf if times is None else times, when or bool))

    def accept(self) -> None:
        """Forget all orders to refuse."""
        with self._lock:
            self._refusals.clear()

    def asked(self, message: Generate) -> None:
        """Note a request. Raises the error that it is refused with."""
        with self._lock:
            self.requests.append(message)
            for order in self._refusals:
                if order.left > 0 and order.fits(message):
                    order.left -= 1
                    raise order.error

    def output(self, message: Generate) -> list[int]:
        """All output tokens of a request, those that it brings too. Raises CierzoError if there are none."""
        tokens, sampling, brought = tokens_of(self._answer(message)), message.sampling, message.output_token_ids
        stops = (*sampling.stop_token_ids, *([] if sampling.ignore_eos else [EOS]))
        output: list[int] = []
        for position in range(sampling.max_tokens):
            output.append(tokens[position % len(tokens)])  # what nothing stops is said again
            if output[-1] in stops and len(output) >= max(sampling.min_tokens, len(brought) + 1):
                break
        return brought + output[len(brought) :]


@dataclass(frozen=True, slots=True)
class ScriptedPrompts(PromptEncoder):
    """The prompts of a model that answers by a script."""

    script: Script = field(default_factory=lambda: Script(""))

    def encode(self, message: Generate, max_tokens: int | None = None, images: Images = NO_IMAGES) -> Prompt:
        """Encode the prompt of a request, unless the script refuses it."""
        self.script.asked(message)
        return PromptEncoder.encode(self, message, max_tokens, images)

    def masked(self, submit: Submit, message: Generate, model: ModelInfo, *, in_thinking: bool) -> Submit:
        """`submit` with the answer to it. Raises CierzoError where the script has none."""
        submit = PromptEncoder.masked(self, submit, message, model, in_thinking=in_thinking)
        fields = {name: getattr(submit, name) for name in Submit.__struct_fields__}
        return Scripted(**fields, tokens=self.script.output(message))


def prompt_of(message: Generate) -> str | tuple[int, ...]:
    """A prompt as a mapping of answers has it: its text, the text of its last turn, or its token ids as a tuple."""
    if message.text is not None:
        return message.text
    if message.token_ids is not None:
        return tuple(message.token_ids)
    content = message.messages[-1].content if message.messages else ""
    if isinstance(content, str):
        return content
    return "".join(chunk.text for chunk in content if isinstance(chunk, TextChunk))


def tokens_of(answer: object) -> list[int]:
    """The tokens of an answer, and the one that ends it. Raises ConfigError for what is no answer, and an answer
    that is an error."""
    if isinstance(answer, CierzoError):
        raise answer
    if isinstance(answer, str):
        return [*answer.encode(), EOS]
    if isinstance(answer, FakeAnswer):
        return [*_said(answer), EOS]
    if _are_tokens(answer):
        return [*answer, EOS]
    raise refusal("answers", ANSWERS, answer)


def _chooser(answers: Any) -> Callable[[Generate], object]:
    """The function that gives each request its answer. Raises ConfigError for what is none."""
    if isinstance(answers, Mapping):
        by_prompt = {prompt: _checked(answer) for prompt, answer in answers.items()}
        return lambda message: _answer_to(by_prompt, prompt_of(message))
    if isinstance(answers, list | tuple) and answers and not _are_tokens(answers):
        in_turn = iter([_checked(answer) for answer in answers])
        return lambda message: _next_of(in_turn, len(answers))
    if callable(answers) and not isinstance(answers, type):
        return lambda message: _answer_of(answers, message)
    answer = _checked(answers)
    return lambda message: answer


def _answer_to(by_prompt: dict[Any, object], prompt: object) -> object:
    if prompt in by_prompt:
        return by_prompt[prompt]
    if None in by_prompt:
        return by_prompt[None]
    shown = repr(prompt)[:200]
    what = f"the fake server has no answer to {shown}"
    raise InvalidRequest(what, field="answers", limit="a prompt among them, or None", value=shown)


def _next_of(in_turn: Any, count: int) -> object:
    for answer in in_turn:
        return answer
    what = f"the fake server has given all its {count} answers"
    raise InvalidRequest(what, field="answers", limit=count, value=count + 1)


def _answer_of(function: Callable[[Generate], object], message: Generate) -> object:
    """Ask a function. The client is told what it raises, or that it gives no answer."""
    try:
        return _checked(function(message))
    except CierzoError as error:
        return error
    except Exception as error:
        what = f"the function that answers for the fake server raised {type(error).__name__}: {error}"
        raise CierzoError(what) from error


def _checked(answer: object) -> object:
    """The answer, if it is one. Raises ConfigError."""
    if not isinstance(answer, CierzoError):
        tokens_of(answer)
    return answer


def _are_tokens(value: Any) -> TypeGuard[Sequence[int]]:
    """Whether it is one list of token ids, and not of answers."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        return False
    return all(isinstance(each, int) and not isinstance(each, bool) and 0 <= each < VOCAB for each in value)


def _said(answer: FakeAnswer) -> list[int]:
    thought = [ID_OF["[THINK]"], *answer.thinking.encode(), ID_OF["[/THINK]"]] if answer.thinking else []
    said = [*thought, *answer.text.encode()]
    for name, arguments in answer.calls:
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        said += [ID_OF["[TOOL_CALLS]"], *name.encode(), ID_OF["[ARGS]"], *written.encode()]
    return said

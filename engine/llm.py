"""`LLM`: the engine inside the caller's process, without sockets.

    llm = LLM("path/to/checkpoint", dtype="float32")
    outs = llm.generate([[1, 2, 3], "text"], SamplingParams(max_tokens=16, temperature=0.0, logprobs=5))
    outs[0].token_ids, outs[0].text, outs[0].finish_reason, outs[0].logprobs, outs[0].samples[0]
    answer = llm.chat(messages, tools=tools, images=[Path("cat.png").read_bytes()])
    answer.thinking, answer.text, answer.tool_calls, answer.turn

Requests are validated, detokenized and cut at stop strings by the code that serves the RPC.
"""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from numbers import Integral
from os import PathLike, fspath
from types import TracebackType
from typing import Any, Self

import msgspec
from tqdm import tqdm

from cierzo.engine.checkpoint import checkpoint_folder
from cierzo.engine.config import EngineConfig, EngineOptions, resolve
from cierzo.engine.errors import CoreFailed, InvalidRequest
from cierzo.engine.frontend import validate
from cierzo.engine.frontend.answer import Answer
from cierzo.engine.frontend.arguments import generate_message, held, sampling_params
from cierzo.engine.frontend.image_parts import images_of
from cierzo.engine.frontend.one_process import OneProcess
from cierzo.engine.frontend.sample import Sample
from cierzo.engine.frontend.validate import SEED_BITS
from cierzo.engine.launch import load_prompts, model_info
from cierzo.engine.messages import (
    Abort,
    ChatMessage,
    ExpertStatistics,
    Grammar,
    SamplingParams,
    Submit,
    TokenDelta,
    TokenLogprobs,
    Tool,
    Usage,
)
from cierzo.engine.outputs import Output, SampleOutput
from cierzo.engine.settings import settings_of
from cierzo.engine.text.grammar import vocabulary_of
from cierzo.engine.text.grammar_check import CheckedGrammars
from cierzo.engine.worker.core import EngineCore
from cierzo.kernels.fault import DeviceFault
from cierzo.scheduler.plan import unpacked_entry

Prompt = str | Sequence[int]
Sampling = SamplingParams | Mapping[str, Any]
PROGRESS_AFTER_S = 2.0

__all__ = ["LLM", "Output", "SampleOutput"]


class LLM(OneProcess):
    """A checkpoint, loaded, and the engine around it.

    Threads may share it: their calls run one after the other. A call from within a running one (a signal handler's)
    raises RuntimeError, and so does every call in a forked child. Cannot be pickled or copied.
    """

    def __init__(self, model: str | PathLike[str], **settings: Any) -> None:
        """Load the checkpoint in folder `model` ("demo": the demo model). `settings`: fields of `EngineOptions`.

        Raises ConfigError for a setting that is unknown or does not fit, CheckpointError.
        """
        super().__init__()
        options = settings_of(EngineOptions, {"model": checkpoint_folder(fspath(model)), **settings})
        self._config, self._prompts = load_prompts(resolve(options))
        self._info = model_info(self._config, self._prompts)
        self._grammars = CheckedGrammars(self._prompts, self._info)
        self._core: EngineCore | None = EngineCore(self._config)
        self._fault = ""
        self._request_ids = count(1)
        self._lock = threading.Lock()  # of `_core`
        self._holder: int | None = None  # the thread that has the lock

    @property
    def config(self) -> EngineConfig:
        """The resolved settings."""
        return self._config

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling: Sampling | Iterable[Sampling] | None = None,
        *,
        suffix: str | None = None,
        grammar: Grammar | Mapping[str, Any] | None = None,
        images: Iterable[Any] | None = None,
        progress: bool = False,
        **params: Any,
    ) -> list[Output]:
        """Continue each prompt (text, or token ids); one prompt alone may be given without its list.

        Token ids may be of numpy or torch: an array of one dimension is a prompt, one of two dimensions several.
        `sampling` (SamplingParams, or a mapping of its fields) is for all prompts, or one each; None: the defaults.
        Further keywords are fields of SamplingParams, on top of it. `progress` shows a bar on a terminal after two
        seconds. The outputs are in the order of the prompts. Raises InvalidRequest, before anything runs, for a
        prompt or parameter that the RPC would refuse too: the message says which prompt's. Raises CoreFailed when
        the device has failed, now and from then on: only a new process can use it again.

        suffix: text that comes behind the answer to a prompt of text, for models that fill in the middle. grammar:
        what each answer holds, such as {"kind": "json_schema", "value": "..."}, of the kinds of docs/structured.md.
        images: for each prompt of token ids the files of the images whose tokens it has, for one prompt alone its
        files; `chat` writes the tokens itself.

        Ctrl-C ends the call. A signal handler that is to end it must raise a BaseException, as Ctrl-C does: an
        Exception within a step is taken for the step's own, and ends only the request that meets it.
        """
        self._check_process()
        listed = _listed(prompts)
        jobs = []
        rows = zip(listed, _each(sampling, len(listed)), _files(images, len(listed)), strict=True)
        for number, (prompt, base, files) in enumerate(rows):
            with _naming_prompt(number, len(listed)):
                fields = {**_fields(prompt), "suffix": suffix, "grammar": grammar, "images": files}
                jobs.append(self._submit(fields, base, params))
        return self._run(jobs, progress)

    def chat(
        self,
        messages: ChatMessage | Mapping[str, Any] | Iterable[ChatMessage | Mapping[str, Any]],
        sampling: Sampling | None = None,
        *,
        tools: Iterable[Tool | Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        reasoning_effort: str | None = None,
        grammar: Grammar | Mapping[str, Any] | None = None,
        images: bytes | Iterable[bytes] | None = None,
        progress: bool = False,
        **params: Any,
    ) -> Output:
        """Answer a conversation, rendered by the checkpoint's chat template.

        One message alone may be given without its list. The other arguments are those of `generate`. The model may
        call `tools` (tool_choice "none": it may not; "required": it must; or the name of the one that it must
        call); without `parallel_tool_calls` its answer ends after one call. grammar: what its text holds. images:
        the files of those parts of the messages that are {"type": "image"} and have no data URL as "url", in order.
        Messages, tools and calls may also have the fields that OpenAI's and Mistral's interfaces give them. Raises
        InvalidRequest, CoreFailed.

            answer = llm.chat(messages, tools=tools)
            while answer.tool_calls:
                messages.append(answer.turn)
                for call in answer.tool_calls:  # run: yours
                    result = run(call.name, call.arguments)
                    messages.append({"role": "tool", "content": result, "tool_call_id": call.id, "name": call.name})
                answer = llm.chat(messages, tools=tools)
        """
        self._check_process()
        fields = {
            "messages": messages,
            "tools": tools,
            "tool_choice": tool_choice,
            "parallel_tool_calls": parallel_tool_calls,
            "reasoning_effort": reasoning_effort,
            "grammar": grammar,
            "images": images,
        }
        return self._run([self._submit(fields, sampling, params)], progress)[0]

    def expert_statistics(self) -> ExpertStatistics | None:
        """Which experts all calls so far have chosen; None without the setting of this name."""
        with self._alone():
            return self._open_core().stats().experts

    def close(self) -> None:
        """Let go of model and cache, once a call that runs in another thread has ended; further calls raise
        RuntimeError. Does nothing in a forked child, whose memory ends with it."""
        if not self._is_forked:
            with self._alone():
                self._core = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Run a block while no other call runs: wait for another thread's, refuse one within this thread's own."""
        self._check_process()
        me = threading.get_ident()
        if self._holder == me and self._lock.locked():
            raise RuntimeError("a call of this LLM runs in this thread already; it must end first")
        with self._lock:
            self._holder = me
            try:
                yield
            finally:
                self._holder = None

    def _open_core(self) -> EngineCore:
        if self._fault:
            raise CoreFailed(self._fault)
        if self._core is None:
            raise RuntimeError("this LLM is closed")
        return self._core

    def _run(self, jobs: list[_Job], progress: bool) -> list[Output]:
        with self._alone():
            core = self._open_core()
            if not core.has_vocabulary and any(job.submit.grammar for job in jobs):
                vocabulary = vocabulary_of(self._prompts, self._info)
                assert vocabulary is not None, "a grammar was written without a vocabulary"
                core.vocabulary(vocabulary)
            run = _Run(core, self._config.scheduler.max_waiting, jobs)
            try:
                run.finish(progress)
            except DeviceFault as fault:
                self._core, self._fault = None, f"this process cannot use its device any more: {fault}"
                raise CoreFailed(self._fault) from fault
            return [job.output() for job in run.jobs.values()]

    def _submit(self, fields: dict[str, Any], sampling: Any, params: dict[str, Any]) -> _Job:
        message = generate_message(**fields, sampling=sampling_params(sampling, params))
        special_ids = self._prompts.special_ids
        prompts, info = self._prompts, self._info
        validate.fields(message, self._config.frontend, info, special_ids, efforts=prompts.efforts)
        prompt = prompts.encode(message, images=images_of(message, self._config.frontend, info))
        seed = message.sampling.seed
        seed = secrets.randbits(SEED_BITS) if seed is None else seed
        submit = validate.request(
            message,
            prompt.token_ids,
            next(self._request_ids),
            seed,
            info,
            special_ids,
            image_token_ids=prompts.image_token_ids,
            images=prompt.images,
        )
        submit = prompts.masked(submit, message, info, in_thinking=prompt.in_thinking)
        if grammar := self._grammars.of(message, in_thinking=prompt.in_thinking):
            submit = msgspec.structs.replace(submit, grammar=grammar)
        samples = [
            Sample(
                index,
                prompts.reader(
                    submit.sampling,
                    apart=True,
                    in_thinking=prompt.in_thinking,
                    calls=prompts.call_limit(message),
                    sample=index,
                    num_prompt_tokens=len(prompt.token_ids),
                ),
            )
            for index in range(submit.sampling.n)
        ]
        return _Job(submit, samples, [Answer() for _ in samples], [[] for _ in samples])


@dataclass(slots=True)
class _Job:
    """A prompt under way."""

    submit: Submit
    samples: list[Sample]
    answers: list[Answer]
    logprobs: list[list[TokenLogprobs]]
    prompt_logprobs: list[msgspec.Raw] = field(default_factory=list)

    def output(self) -> Output:
        finishes = [sample.finish for sample in self.samples if sample.finish is not None]
        usage = Usage(
            prompt_tokens=len(self.submit.prompt_token_ids),
            output_tokens=sum(len(sample.token_ids) for sample in self.samples),
            cached_tokens=max(finish.cached_tokens for finish in finishes),
        )
        asked = self.submit.sampling.logprobs is not None
        samples = []
        for sample, answer, finish in zip(self.samples, self.answers, finishes, strict=True):
            reason, broken_calls = sample.outcome(finish)
            output = SampleOutput(
                token_ids=sample.token_ids.tolist(),
                text=answer.text,
                finish_reason=reason,
                logprobs=self.logprobs[sample.index] if asked else None,
                stop=sample.stop,
                message=finish.message,
                parts=answer.parts,
                broken_calls=broken_calls,
                incomplete=finish.incomplete,
            )
            samples.append(output)
        params, prompt_logprobs = self.submit.sampling, None
        if params.prompt_logprobs is not None:
            prompt_logprobs = [unpacked_entry(entry) for entry in self.prompt_logprobs]
        assert params.seed is not None
        return Output(self.submit.prompt_token_ids, samples, usage, params.seed, prompt_logprobs)


class _Run:
    """A call of `generate`: its requests through the core until all have ended."""

    def __init__(self, core: EngineCore, max_waiting: int, jobs: list[_Job]) -> None:
        self.jobs = {job.submit.request_id: job for job in jobs}
        self._core = core
        self._max_waiting = max_waiting
        self._live = 0  # sequences in the core

    def finish(self, progress: bool) -> None:
        """Step until every sample has ended. Interrupted, wherever that was, the core is left as good as new.

        Not after a DeviceFault, which leaves nothing that could be used again.
        """
        pending = deque(self.jobs.values())
        total = sum(len(job.samples) * job.submit.sampling.max_tokens for job in pending)
        disable = None if progress else True  # None: only on a terminal
        with tqdm(total=total, unit="token", delay=PROGRESS_AFTER_S, disable=disable, leave=False) as bar:
            try:
                while pending or self._live:
                    self._feed(pending)
                    for delta in self._core.step():
                        self._take(delta)
                        bar.update(len(delta.token_ids))
                        if delta.finish is not None:  # what it was allowed to say, and did not
                            allowed = self.jobs[delta.request_id].submit.sampling.max_tokens
                            bar.total -= max(allowed - delta.finish.output_tokens, 0)
            except DeviceFault:
                raise
            except BaseException:
                self._core.reset()
                raise

    def _feed(self, pending: deque[_Job]) -> None:
        """Submit what the waiting queue can hold for certain."""
        while pending and (not self._live or self._live + len(pending[0].samples) <= self._max_waiting):
            job = pending.popleft()
            self._core.submit(job.submit)
            self._live += len(job.samples)

    def _take(self, delta: TokenDelta) -> None:
        """Hand a delta to its sample."""
        job = self.jobs[delta.request_id]
        sample = job.samples[delta.sample]
        job.prompt_logprobs += delta.prompt_logprobs or []
        if not sample.cut:
            token_ids, text, logprobs, parts = sample.take(delta)
            job.answers[delta.sample].take(parts, text, len(token_ids))
            job.logprobs[delta.sample] += logprobs or []
            if sample.cut and delta.finish is None:
                self._core.abort(Abort(request_id=delta.request_id, sample=delta.sample))
        if delta.finish is not None:
            sample.end(delta.finish)
            self._live -= 1


@contextmanager
def _naming_prompt(number: int, count: int) -> Iterator[None]:
    """Say which of several prompts was refused."""
    try:
        yield
    except InvalidRequest as error:
        if count == 1:
            raise
        message = f"prompt {number}: {error.message}"
        raise InvalidRequest(message, field=error.field, limit=error.limit, value=error.value) from error


def _listed(prompts: Any) -> list[Any]:
    """A list of prompts, from one or several."""
    prompts = held(prompts, "prompts")
    if isinstance(prompts, str):
        return [prompts]
    listed = list(_checked(prompts, "prompts", "text, token ids, or a list of such prompts"))
    return [listed] if listed and _is_number(listed[0]) else listed


def _fields(prompt: Any) -> dict[str, Any]:
    """A prompt under the name of its field in a Generate message."""
    if isinstance(prompt, str):
        return {"text": prompt}
    return {"token_ids": _checked(prompt, "prompt", "text or token ids")}


def _checked(value: Any, field: str, kinds: str) -> Iterable[Any]:
    """An iterable that may be meant as a list. Raises InvalidRequest for anything else."""
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | bytearray | Mapping | set | frozenset):
        return value
    kind = type(value).__name__
    raise InvalidRequest(f"the {field} must be {kinds}, got {kind}", field=field, limit=kinds, value=kind)


def _is_number(value: Any) -> bool:
    """Whether a value is a token id rather than a prompt: an integer, also one that numpy or torch holds."""
    return isinstance(value, Integral) or getattr(value, "ndim", None) == 0


def _files(images: Any, count: int) -> list[Any]:
    """The files of each prompt's images. Raises InvalidRequest for other numbers of lists than of prompts."""
    if images is None:
        return [None] * count
    images = [images] if isinstance(images, bytes | bytearray | memoryview) else images
    each = list(_checked(images, "images", "files, or for each prompt a list of them"))
    if count == 1 and all(isinstance(one, bytes | bytearray | memoryview) for one in each):
        return [each]
    if len(each) != count:
        what = f"{len(each)} lists of images for {count} prompts"
        raise InvalidRequest(what, field="images", limit=count, value=len(each))
    return each


def _each(sampling: Any, count: int) -> list[Any]:
    """The parameters of each prompt, from those of all or one each."""
    if sampling is None or isinstance(sampling, SamplingParams | Mapping):
        return [sampling] * count
    kinds = "SamplingParams, a mapping of its fields, or one of these for each prompt"
    each = list(_checked(held(sampling, "sampling"), "sampling", kinds))
    if len(each) != count:
        raise InvalidRequest(
            f"{len(each)} sampling parameters for {count} prompts", field="sampling", limit=count, value=len(each)
        )
    return each

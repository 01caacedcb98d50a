"""Grammars in the core: matchers that follow what sequences generate, and masks of the tokens that may come next.

A `Constraint` is one sequence's. Its matcher is made by a thread, while the sequence is held; the mask of the next
token too, as soon as the last one is known. The core's loop only feeds tokens to matchers, which takes a
microsecond each. Nobody waits for a slow mask: a sequence whose mask is not there when its step chooses tokens gets
none from that step, and has its last row computed again.

    hold ─ thread: matcher, output so far, first mask ─▶ made ─▶ admit ─▶ follow(token) ─ thread: mask ─▶ ...
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cierzo.engine.messages import Submit, Vocabulary
from cierzo.engine.text.grammar_limits import parser_limits
from cierzo.engine.text.token_table import grammar_tokenizer
from cierzo.scheduler.plan import GrammarState, RequestKey

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MASK_WAIT_S = 0.010  # that a step waits for masks once its logits are there
MASK_THREADS = 8  # at most
MAKING_THREADS = 2
MAKING_STACK_BYTES = 256 << 20  # address space: what is not used takes no memory
FOLLOWING_S = 0.005  # processor time of a step for feeding matchers
FOLLOWED_AT_ONCE_S = 20e-6  # which 250 sequences may take in a step
FOLLOWED_WITHIN_S = 0.005  # processor time of one token; an ordinary one takes a microsecond
CONSUMED_AT_ONCE = 64  # tokens of an earlier output, at most
CONSUMED_WITHIN_S = 0.0005, 0.020  # processor time: where it takes longer, fewer; and of one of them, at most
KEPT_MATCHERS = 16  # of grammars seen last, before their first token
KEPT_BELOW_S = 0.5  # what takes longer to make is large, and is not kept
POLL_S = 0.001
_NICE = 10  # of threads that make matchers: they give way to those that compute

Words = NDArray[np.int32]
Jobs = SimpleQueue[Callable[[], None] | None]


class Constraint:
    """Grammar of one sequence: what it has followed of the output, and which tokens may come next.

    `mask`: int32 [ceil(N/32)], a bit for each token; it holds while `is_ready`. `state`: what the grammar says of
    the output so far. `error`: why it cannot go on, empty as long as it can. A matcher panics by a BaseException of
    its own: whatever it raises is this sequence's own failure.
    """

    def __init__(self, makers: Makers, grammar: str = "") -> None:
        self.grammar = grammar
        self.state: GrammarState = "open"
        self.error = ""
        self.is_ready = False  # matcher, state and mask are there, and no thread has them
        self.is_dropped = False
        self.mask_s = self.follow_s = 0.0  # that the last mask and the last token took
        self.num_untold = 0  # steps in a row that did not tell it their token, see `follow_all`
        self.mask: Words = _NO_WORDS
        self.makers = makers
        self.num_admissions = 0  # what was chosen before the last one is nothing to it
        self._matcher: LLMatcher | None = None
        self._followed = array("I")
        self._wanted: Sequence[int] | None = None  # the output that it is to stand at, once no thread has it

    @property
    def num_followed(self) -> int:
        """Tokens of the output that it has followed."""
        return len(self._followed)

    @property
    def place(self) -> str:
        """The place of the next token, for whoever says why there is none."""
        return f"(token {len(self._followed) + 1} of the answer)"

    def admit(self, output: Sequence[int]) -> None:
        """Begin anew behind an output: what a step chose that was dropped is taken back."""
        self.num_admissions += 1
        self._wanted = output
        self.settle()

    def settle(self) -> bool:
        """Whether a token may be chosen now, or never will: mask and state are those of the output."""
        if self.is_ready and self._wanted is not None:
            wanted, self._wanted = self._wanted, None
            if len(wanted) != len(self._followed) or [*wanted[-1:]] != [*self._followed[-1:]]:
                self._go_to(wanted)
                self.makers.mask([self] * self._needs_mask())
        return self.is_ready

    def drop(self) -> None:
        """Go no further, as nobody asks any more. A matcher may take megabytes, and the slot of a sequence that has
        ended remembers this object until another one takes it; one that is still to be made need not be."""
        self.is_dropped = True
        self.error = self.error or "grammar: its sequence has ended"  # first: no thread begins with it then
        self._matcher = None

    def follow(self, token_id: int) -> bool:
        """Take in the output's next token; whether a mask is to be made of what may come behind it."""
        self._consume([token_id])
        return self._needs_mask()

    # --- in a thread, or on the loop while no thread has it ---

    def take(self, matcher: LLMatcher, output: Sequence[int], mask: Words | None) -> None:
        """Begin with a matcher of the grammar, and the output of an earlier run. mask: that of the first token, if
        it is known."""
        self._matcher = matcher
        self._read_state()
        if output:
            self._consume(output)
            mask = None
        if mask is not None:
            self.mask = mask.copy()
        elif self._needs_mask():
            self.make_mask()

    def make_mask(self) -> None:
        """Make the mask of the next token."""
        start = time.perf_counter()
        if self.mask is _NO_WORDS:
            self.mask = self.makers.empty_mask()
        self._guarded(self._fill)
        self.mask_s = time.perf_counter() - start
        self.is_ready = True
        self.makers.moved()

    def _fill(self, matcher: LLMatcher) -> None:
        matcher.unsafe_compute_mask_ptr(self.mask.ctypes.data, self.mask.nbytes)
        if matcher.is_error():
            raise ValueError(_told(matcher.get_error()))
        if not self.mask.any():
            raise ValueError("no token may come next")

    def _needs_mask(self) -> bool:
        return not self.error and self.state != "ended"

    def _consume(self, token_ids: Sequence[int]) -> None:
        def consume(matcher: LLMatcher) -> None:
            at, count = 0, 1
            while at < len(token_ids):  # each time holds the interpreter
                some, start_s = [*token_ids[at : at + count]], time.thread_time()
                if not matcher.consume_tokens(some):
                    raise ValueError(_told(matcher.get_error()))
                self._followed.extend(some)
                at, took_s = at + count, time.thread_time() - start_s
                if took_s > CONSUMED_WITHIN_S[1] and count == 1 < len(token_ids):
                    raise ValueError(_slow(took_s, CONSUMED_WITHIN_S[1]))
                count = min(2 * count, CONSUMED_AT_ONCE) if took_s < CONSUMED_WITHIN_S[0] else max(1, count // 4)

        self._guarded(consume)
        self._read_state()

    def _read_state(self) -> None:
        def read(matcher: LLMatcher) -> None:
            if matcher.is_error():
                raise ValueError(_told(matcher.get_error()))
            self.state = "ended" if matcher.is_stopped() else "may end" if matcher.is_accepting() else "open"

        if not self.error:
            self._guarded(read)

    def _go_to(self, output: Sequence[int]) -> None:
        """Take back what is no more part of the output, and follow what is new."""
        common = min(len(output), len(self._followed))
        while common and output[common - 1] != self._followed[common - 1]:
            common -= 1
        surplus = len(self._followed) - common

        def go_back(matcher: LLMatcher) -> None:
            if surplus and not matcher.rollback(surplus):
                raise ValueError(f"cannot take back {surplus} tokens")
            del self._followed[common:]

        self._guarded(go_back)
        self._consume(output[common:])

    def _guarded(self, work: Callable[[LLMatcher], None]) -> None:
        """Do something with the matcher; what fails is told in `error`, with the place in the answer."""
        matcher = self._matcher
        if self.error or matcher is None:  # in this order: `drop` may come in between
            return
        try:
            work(matcher)
        except BaseException as error:  # a panic of the matcher is no Exception
            self.fail(_reason(error))
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise

    def fail(self, why: str) -> None:
        """Go no further."""
        self.error = f"grammar: {why} {self.place}"
        self._matcher = None  # which may be in any state


class Making:
    """The samples of a request whose matchers are being made."""

    def __init__(self, submit: Submit, constraints: list[Constraint]) -> None:
        first = submit.first_sample
        self.request_id = submit.request_id
        self.keys: list[RequestKey] = [(submit.request_id, first + index) for index in range(len(constraints))]
        self.constraints = constraints
        self.grammar, self.output = submit.grammar, submit.output_token_ids


class Makers:
    """Threads that make matchers and masks, the tokenizer that they share, and the matchers that are kept."""

    def __init__(self) -> None:
        self._made: deque[Making] = deque()  # filled by threads, for the loop
        self.num_at_work = 0  # requests that `take_made` has not given yet
        self._tokenizer: LLTokenizer | None = None
        self._num_words = 0
        self._moved = threading.Event()  # a matcher or a mask is there
        self._makings: Jobs = SimpleQueue()
        self._masks: Jobs = SimpleQueue()
        self._has_threads = False
        self._kept: OrderedDict[str, tuple[LLMatcher, Words]] = OrderedDict()
        self._lock = threading.Lock()  # of what is kept

    def use(self, vocabulary: Vocabulary) -> None:
        """Take the vocabulary. Holds the interpreter for half a second with 131,072 tokens."""
        self._tokenizer = grammar_tokenizer(vocabulary)
        self._num_words = -(-len(vocabulary.tokens) // 32)

    @property
    def has_vocabulary(self) -> bool:
        """Whether grammars can be made."""
        return self._tokenizer is not None

    def forget(self) -> None:
        """Forget what is being made: nobody waits for it any more."""
        self._made, self.num_at_work = deque(), 0

    def empty_mask(self) -> Words:
        """Memory of a mask."""
        return np.zeros(self._num_words, np.int32)

    def open(self, submit: Submit) -> Making:
        """The samples of a request, and their constraints, for `begin`."""
        return Making(submit, [Constraint(self, submit.grammar) for _ in range(submit.sampling.n)])

    def begin(self, making: Making) -> None:
        """Have matchers made; they are ready once `take_made` gives them."""
        if not self._has_threads:
            self._start_threads()
        self.num_at_work += 1
        self._makings.put(partial(self._make, making, self._made))

    def take_made(self) -> list[Making]:
        """Requests whose matchers are there since the last call."""
        made = []
        while self._made:
            made.append(self._made.popleft())
        self.num_at_work -= len(made)
        return made

    def wait(self, timeout_s: float) -> None:
        """Wait until a matcher or a mask is there."""
        self._moved.wait(timeout_s)
        self._moved.clear()

    def moved(self) -> None:
        """Wake whoever waits, from a thread."""
        self._moved.set()

    def mask(self, constraints: Iterable[Constraint]) -> None:
        """Have masks made, those first that took the least time before."""
        for constraint in sorted(constraints, key=lambda one: one.mask_s):
            constraint.is_ready = False
            self._masks.put(constraint.make_mask)

    def _start_threads(self) -> None:
        """Threads that end with this object. A compiler calls itself for each rule that a rule names: a thread has
        the stack for all the symbols that a grammar may have."""
        self._has_threads = True
        num_maskers = max(1, min(MASK_THREADS, len(os.sched_getaffinity(0))))
        before = threading.stack_size(MAKING_STACK_BYTES)
        try:
            for number in range(MAKING_THREADS):
                _start(f"grammar-{number}", self._makings, _NICE)
        finally:
            threading.stack_size(before)
        for number in range(num_maskers):
            _start(f"mask-{number}", self._masks, 0)
        weakref.finalize(self, _end_threads, [(self._makings, MAKING_THREADS), (self._masks, num_maskers)])

    # --- in threads ---

    def _make(self, making: Making, made: deque[Making]) -> None:
        wanted = [constraint for constraint in making.constraints if not constraint.is_dropped]
        try:
            if wanted:
                base, first = self._matcher(making.grammar)
            for constraint in wanted:
                constraint.take(base if constraint is wanted[-1] else base.deep_copy(), making.output, first)
        except BaseException as error:
            for constraint in making.constraints:
                constraint.error = constraint.error or f"grammar: {_reason(error)}"
        for constraint in making.constraints:
            constraint.is_ready = True
        made.append(making)
        self.moved()

    def _matcher(self, grammar: str) -> tuple[LLMatcher, Words]:
        """A matcher of a grammar at its start, and the mask of the first token. Raises ValueError."""
        from llguidance import LLMatcher

        with self._lock:
            kept = self._kept.get(grammar)
            if kept is not None:
                self._kept.move_to_end(grammar)
                return kept[0].deep_copy(), kept[1]
        start = time.perf_counter()
        assert self._tokenizer is not None
        matcher, mask = LLMatcher(self._tokenizer, grammar, log_level=0, limits=parser_limits()), self.empty_mask()
        if not matcher.is_error():
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if matcher.is_error():
            raise ValueError(_told(matcher.get_error()))
        if not mask.any():
            raise ValueError("no token may come next")
        if time.perf_counter() - start < KEPT_BELOW_S:
            copy = matcher.deep_copy()
            with self._lock:
                self._kept[grammar] = copy, mask
                while len(self._kept) > KEPT_MATCHERS:
                    self._kept.popitem(last=False)
        return matcher, mask


def follow_all(chosen: Sequence[tuple[Constraint, int]]) -> set[int]:
    """Tell constraints the tokens that were chosen for them, and have the masks of the next ones made.

    It takes the interpreter's time: once that is spent, others are not told. Their indices are returned: their
    tokens count as not chosen, and will be chosen again. Whose last token took next to no time comes first, so that
    nobody waits behind tokens that take a step's; then who waits longest.
    """
    untold, behind, spent_s = set[int](), [], 0.0
    turns = [(one.follow_s > FOLLOWED_AT_ONCE_S, -one.num_untold, at) for at, (one, _) in enumerate(chosen)]
    for _, _, index in sorted(turns):
        constraint, token_id = chosen[index]
        if spent_s > FOLLOWING_S:
            untold.add(index)
            constraint.num_untold += 1
            continue
        constraint.num_untold = 0
        start = time.thread_time()
        needs_mask = constraint.follow(token_id)
        constraint.follow_s = took_s = time.thread_time() - start
        spent_s += took_s
        if took_s > FOLLOWED_WITHIN_S:
            constraint.fail(_slow(took_s, FOLLOWED_WITHIN_S))
        elif needs_mask:
            behind.append(constraint)
    if behind:
        behind[0].makers.mask(behind)
    return untold


def await_masks(constraints: Collection[Constraint]) -> None:
    """Wait until the masks of all are there, but no longer than MASK_WAIT_S."""
    give_up_s = time.monotonic() + MASK_WAIT_S
    while (late := [one for one in constraints if not one.settle()]) and (
        left_s := give_up_s - time.monotonic()
    ) > 0:
        late[0].makers.wait(left_s)


_NO_WORDS: Words = np.zeros(0, np.int32)


def _start(name: str, jobs: Jobs, nice: int) -> None:
    threading.Thread(target=_work, args=(jobs, nice), name=name, daemon=True).start()


def _work(jobs: Jobs, nice: int) -> None:
    """Do jobs until None comes. nice: how far behind other threads of this process."""
    if nice:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
    for job in iter(jobs.get, None):
        job()
        del job  # which would keep all from being let go of


def _end_threads(queues: list[tuple[Jobs, int]]) -> None:
    for jobs, num_threads in queues:
        for _ in range(num_threads):
            jobs.put(None)


def _slow(took_s: float, most_s: float) -> str:
    return f"a token took {took_s * 1e3:.0f} ms to follow, more than {most_s * 1e3:.0f}"


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _told(message: str) -> str:
    """A message of llguidance's, without what it knows of the parser. "NoExtensionBias" is said where a text could
    go on, and no token of the vocabulary could stand there."""
    message = message.partition("\n<")[0].strip()
    return "no token may come next" if message in ("", "NoExtensionBias") else message

"""The engine on images against transformers' Mistral 3: whole answers, through all that a scheduler does to them.

Images of odd sizes stand first, last, between and in several turns; chunks end inside them, prefixes are found up
to the middle of one, requests are preempted and resumed, towers work in stages beside those who decode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from vision_oracle import TEXTS, image, image_tokens, oracle_logits, write_folder

from cierzo.cache.layout import GIB
from cierzo.engine.config import EngineOptions, resolve
from cierzo.engine.messages import PromptImage, SamplingParams, Submit
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.runner import load_runner
from cierzo.scheduler.cost import StepCost

BLOCK_TOKENS, MAX_LEN, NEW_TOKENS = 4, 120, 4
Part = int | tuple[int, int, int]  # a token, or rows, columns and seed of an image
PROMPTS: dict[str, list[Part]] = {
    "first": [(3, 5, 1), 20, 21, 22],
    "last": [1, 20, 21, (4, 1, 2)],
    "alone": [(2, 7, 3)],
    "between": [1, 20, (1, 1, 4), (5, 3, 5), 21, (1, 6, 6), 22, 23],
    "turns": [1, 20, (2, 3, 1), 21, 30, 31, 32, 33, 20, (3, 2, 2), 21, 40, 41, 20, (2, 3, 1), 21],
}


def prompt_of(parts: list[Part]) -> tuple[list[int], list[PromptImage], list[torch.Tensor]]:
    tokens: list[int] = []
    images: list[PromptImage] = []
    pictures: list[torch.Tensor] = []
    for part in parts:
        if isinstance(part, int):
            tokens.append(part)
            continue
        rows, columns, _ = part
        pictures.append(image(*part))
        pixels = pictures[-1].numpy().tobytes()
        digest = blake2b(pixels + bytes([rows, columns]), digest_size=16).digest()
        images.append(PromptImage(len(tokens), rows, columns, digest, pixels))
        tokens += image_tokens(rows, columns)
    return tokens, images, pictures


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    rows: list[dict[int, float]] = field(default_factory=list)  # log-probabilities of the whole vocabulary


class Engine:
    def __init__(self, folder: Path, *, num_blocks: int = 80, **settings: Any) -> None:
        layout = read_model_config(folder).cache_layout(BLOCK_TOKENS, "float32")
        options = {
            "block_tokens": BLOCK_TOKENS,
            "max_model_len": MAX_LEN,
            "kv_cache_gib": (num_blocks + 0.5) * layout.bytes_per_block / GIB,
            "max_step_ms": 0.0,
            **settings,
        }
        self.config = resolve(EngineOptions(model=str(folder), dtype="float32", threads=1, **options))
        self.core = EngineCore(self.config, load_runner(self.config))
        self._count = 0

    def submit(self, parts: list[Part], output: list[int] | None = None, max_tokens: int = NEW_TOKENS) -> int:
        self._count += 1
        tokens, images, _ = prompt_of(parts)
        vocab_size = self.config.model.vocab_size
        sampling = SamplingParams(
            max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logprobs=vocab_size, seed=0
        )
        self.core.submit(
            Submit(
                request_id=self._count,
                prompt_token_ids=tokens,
                sampling=sampling,
                output_token_ids=output or [],
                images=images,
            )
        )
        return self._count

    def run(self) -> dict[int, Answer]:
        answers: dict[int, Answer] = {}
        while self.core.has_work():
            for delta in self.core.step():
                assert delta.finish is None or delta.finish.reason == "length", delta.finish
                answer = answers.setdefault(delta.request_id, Answer())
                answer.tokens += delta.token_ids
                answer.rows += [
                    dict(zip(entry.top_token_ids, entry.top_logprobs, strict=True))
                    for entry in delta.logprobs or ()
                ]
            self.core.check()
        return answers


def require(text: str, parts: list[Part], answer: Answer, output: list[int] | None = None) -> None:
    """The answer's tokens, and the log-probabilities of all tokens at each place, are transformers'."""
    tokens, _, pictures = prompt_of(parts)
    whole = [*tokens, *(output or []), *answer.tokens]
    scores = oracle_logits(text, whole[:-1], pictures).log_softmax(-1)[-len(answer.tokens) :]
    found = torch.tensor([[row[token] for token in range(scores.shape[1])] for row in answer.rows])
    torch.testing.assert_close(found, scores, rtol=0, atol=2e-3)
    assert answer.tokens == scores.argmax(-1).tolist()


@pytest.fixture(scope="module", params=sorted(TEXTS))
def text(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("vision") / text.replace(" ", "-"), text)


def in_one_go(folder: Path) -> dict[str, Answer]:
    engine, found = Engine(folder, budget_tokens=256, max_chunk_tokens=256, prefix_caching=False), {}
    for name, parts in PROMPTS.items():
        number = engine.submit(parts)
        found[name] = engine.run()[number]
    return found


def in_company_and_chunks(folder: Path) -> dict[str, Answer]:
    engine = Engine(folder, budget_tokens=16, max_chunk_tokens=5, max_running=8)
    numbers = {name: engine.submit(parts) for name, parts in PROMPTS.items()}
    answers = engine.run()
    return {name: answers[number] for name, number in numbers.items()}


def preempted(folder: Path) -> dict[str, Answer]:
    engine = Engine(folder, num_blocks=32, budget_tokens=20, max_chunk_tokens=9, max_running=8)
    others = [engine.submit([1, 60 + number], max_tokens=50) for number in range(3)]
    numbers = {name: engine.submit(parts) for name, parts in PROMPTS.items()}
    answers = engine.run()
    assert engine.core.stats().preemptions > 0
    assert all(len(answers[number].tokens) == 50 for number in others)
    return {name: answers[number] for name, number in numbers.items()}


def in_stages(folder: Path) -> dict[str, Answer]:
    """A layer or two of the tower in a step, beside a stream that decodes."""
    engine = Engine(folder, budget_tokens=32, max_chunk_tokens=16, max_running=8, max_step_ms=1000.0)
    engine.core._scheduler.reprice(StepCost(0.0, 0.0, 0.0, 0.0, 0.01, 0.0, embedding_s=0.2))
    engine.core._times.took = lambda work, seconds: False  # type: ignore[method-assign]
    begun = []
    engine.core.observe = lambda plan: begun.extend(plan.begun)
    engine.submit([1, 70], max_tokens=80)
    engine.core.step()
    numbers = {name: engine.submit(parts) for name, parts in PROMPTS.items()}
    answers = engine.run()
    assert len(begun) > 3
    return {name: answers[number] for name, number in numbers.items()}


WAYS = [in_one_go, in_company_and_chunks, preempted, in_stages]


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_those_of_transformers(
    text: str, folder: Path, way: Callable[[Path], dict[str, Answer]]
) -> None:
    for name, answer in way(folder).items():
        assert len(answer.tokens) == NEW_TOKENS, name
        require(text, PROMPTS[name], answer)


def test_a_prefix_may_end_inside_any_image_of_a_prompt(text: str, folder: Path) -> None:
    """Each prompt behind one that ends with one of its images, in the last whole block of which the image goes on;
    its embeddings are gone by then."""
    for parts in PROMPTS.values():
        for place, part in enumerate(parts):
            if isinstance(part, int) or part[:2] == (1, 1):  # of one token and an end
                continue
            engine = Engine(folder, budget_tokens=64, max_chunk_tokens=64, image_cache_tokens=1)
            before, images, _ = prompt_of(parts[: place + 1])
            text_before = [60] * ((2 - len(before)) % BLOCK_TOKENS)
            engine.submit([*text_before, *parts[: place + 1]], max_tokens=1)
            engine.run()
            engine.submit([61, (1, 1, 9)], max_tokens=1)
            engine.run()
            starts: dict[int, int] = {}
            engine.core.observe = lambda plan, starts=starts: starts.update(
                {seq.key[0]: seq.start for seq in reversed(plan.seqs) if seq.key[0] not in starts}
            )
            whole = [*text_before, *parts, 50, 51]
            number = engine.submit(whole)
            answer = engine.run()[number]
            assert images[-1].offset < starts[number] - len(text_before) < len(before) - 1, "not inside"
            require(text, whole, answer)


def test_an_answer_goes_on_after_its_core_was_lost(text: str, folder: Path) -> None:
    whole = in_one_go(folder)
    for name, parts in PROMPTS.items():
        engine, output = Engine(folder, budget_tokens=16, max_chunk_tokens=7), whole[name].tokens[:2]
        number = engine.submit(parts, output)
        answer = engine.run()[number]
        assert answer.tokens == whole[name].tokens[2:]
        require(text, parts, answer, output)


def test_a_model_without_its_tower_refuses(text: str, folder: Path) -> None:
    engine = Engine(folder, text_only=True)
    assert engine.config.model.vision is None
    number = engine.submit(PROMPTS["first"])
    deltas = [delta for _ in range(5) for delta in engine.core.step()]
    (finish,) = [delta.finish for delta in deltas if delta.request_id == number and delta.finish is not None]
    assert (finish.reason, "takes no images" in finish.message) == ("failed", True)
    assert msgspec.structs.asdict(finish)["output_tokens"] == 0

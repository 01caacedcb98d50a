"""transformers agrees with the engine: checkpoints that it wrote, loaded, scheduled, computed and sampled by us.

An answer is checked against one forward pass of the oracle over (known tokens + answer): if each token is the
oracle's best after those before it, then the oracle's own greedy answer is this one, by induction. Every way of
computing also asserts that it was taken, by what the runner was given.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from oracle import ORACLES, make_oracle, oracle_logits, vocab_size
from torch import Tensor

from cierzo.cache.layout import GIB
from cierzo.cache.pool import GqaPages
from cierzo.engine import LLM, SamplingParams
from cierzo.engine.config import EngineOptions, resolve
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.llm import Output
from cierzo.engine.messages import Finish, Submit, TokenLogprobs
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.worker import scoring
from cierzo.engine.worker.batch import Batch
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.runner import ModelRunner, load_runner
from cierzo.kernels import registry
from cierzo.scheduler.plan import StepPlan, StepResult

FAR = "moe_8192"
NAMES = [name for name in ORACLES if name != FAR]
LENGTHS = (37, 9, 22)
OUTPUT_TOKENS = 24
BLOCK_TOKENS = 4
MAX_MODEL_LEN = 72
DATA = Path(__file__).parent / "data"

Checkpoints = Callable[[str], Path]


@dataclass
class Answer:
    """What followed the `known` tokens (the prompt, and output that was given along with it)."""

    known: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: Finish | None = None


class WatchedRunner:
    """A model runner over pages full of NaN that remembers which segments each step computed."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner, self.experts = runner, runner.experts
        self.expanded: list[list[int]] = []  # per step: lengths of its segments
        self.absorbed: list[list[int]] = []
        self.admitted_at: list[int] = []  # first computed position of each admission
        for layer in runner._kv.layers:
            for pages in (layer.keys, layer.values) if isinstance(layer, GqaPages) else (layer.latents,):
                pages.fill_(float("nan"))

    def launch(self, plan: StepPlan, batch: Batch) -> None:
        self.expanded.append([*batch.expanded.query_lengths])
        self.absorbed.append([*batch.absorbed.query_lengths])
        self.admitted_at += [seq.start for seq in plan.seqs if seq.admission is not None]
        self._runner.launch(plan, batch)

    def collect(self) -> StepResult:
        return self._runner.collect()

    def describe(self) -> str:
        return self._runner.describe()


class Engine:
    """A core on a checkpoint that transformers wrote."""

    def __init__(self, folder: Path, *, num_blocks: int = 64, **settings: Any) -> None:
        chosen = {"block_tokens": BLOCK_TOKENS, "max_model_len": MAX_MODEL_LEN, **settings}
        layout = read_model_config(folder).cache_layout(chosen["block_tokens"], "float32")
        kv_cache_gib = (num_blocks + 0.5) * layout.bytes_per_block / GIB
        config = resolve(
            EngineOptions(model=str(folder), dtype="float32", threads=1, kv_cache_gib=kv_cache_gib, **chosen)
        )
        assert config.cache.num_blocks == num_blocks
        self.vocab_size = config.model.vocab_size
        self.runner = WatchedRunner(load_runner(config))
        self.core = EngineCore(config, self.runner)
        self._num_requests = 0

    def run(
        self, *prompts: list[int], output: list[int] | None = None, max_tokens: int = OUTPUT_TOKENS
    ) -> list[Answer]:
        """Greedy answers with the logprobs of the whole vocabulary. `output`: resume after these tokens."""
        sampling = SamplingParams(
            max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logprobs=self.vocab_size, seed=0
        )
        answers: dict[int, Answer] = {}
        for prompt in prompts:
            self._num_requests += 1
            answers[self._num_requests] = Answer(prompt + (output or []))
            self.core.submit(
                Submit(
                    request_id=self._num_requests,
                    prompt_token_ids=prompt,
                    output_token_ids=output or [],
                    sampling=sampling,
                )
            )
        while self.core.has_work():
            for delta in self.core.step_plain():
                answer = answers[delta.request_id]
                answer.tokens += delta.token_ids
                answer.logprobs += delta.logprobs or []
                answer.finish = delta.finish
            self.core.check()
        for answer in answers.values():
            assert answer.finish is not None
            assert answer.finish.reason == "length", answer.finish
            assert len(answer.tokens) == max_tokens - len(output or [])
        return [*answers.values()]


def agree(answer: Answer, logits: Tensor) -> None:
    """Tokens and logprobs are those of the oracle's `logits`, fp32 [len(known + tokens) - 1, vocab].

    Logits that differ by at most e differ by at most 2e after log-softmax, where e is 1e-4 of the largest logit.
    """
    logits = logits[len(answer.known) - 1 :]
    assert logits.shape[0] == len(answer.tokens) == len(answer.logprobs) > 0
    margins = logits.topk(2, dim=-1).values
    clear = margins[:, 0] - margins[:, 1] > 1e-3
    assert clear.float().mean() > 0.9, "the oracle's logits are too alike for a greedy comparison to mean anything"
    assert torch.equal(torch.tensor(answer.tokens)[clear], logits.argmax(-1)[clear])

    expected, tolerance = logits.log_softmax(-1), 2e-4 * float(logits.abs().max())
    assert [entry.token_id for entry in answer.logprobs] == answer.tokens
    chosen = expected.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
    top_ids = torch.tensor([entry.top_token_ids for entry in answer.logprobs])
    top = torch.tensor([entry.top_logprobs for entry in answer.logprobs])
    for found, right in (
        (torch.tensor([entry.logprob for entry in answer.logprobs]), chosen),
        (top, expected.gather(1, top_ids)),
        (top, expected.topk(top.shape[1]).values),
    ):
        assert (found - right).abs().max() <= tolerance


def agree_with(name: str, *answers: Answer) -> None:
    """`agree`, with a case's oracle."""
    for answer in answers:
        agree(answer, oracle_logits(name, answer.known + answer.tokens[:-1]))


def make_prompts(name: str, seed: int = 0) -> list[list[int]]:
    """One prompt of each length."""
    tokens = random.Random(seed)
    return [tokens.choices(range(vocab_size(name)), k=length) for length in LENGTHS]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Folders as transformers writes them, some in several shards."""
    folders: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            make_oracle(name).save_pretrained(folders[name], max_shard_size="50KB")
        return folders[name]

    return folder_of


# --- the ways of computing ---------------------------------------------------------------------------------


def in_one_go(folder: Path, prompts: list[list[int]]) -> list[Answer]:
    """The whole prompt in one step, then a token per step; and once more, since nothing is kept."""
    engine = Engine(folder, prefix_caching=False)
    answers = engine.run(prompts[0]) + engine.run(prompts[0])
    assert engine.runner.expanded == [[LENGTHS[0]], *[[]] * (OUTPUT_TOKENS - 1)] * 2
    assert engine.runner.absorbed == [[], *[[1]] * (OUTPUT_TOKENS - 1)] * 2
    return answers


def in_chunks(folder: Path, prompts: list[list[int]]) -> list[Answer]:
    """Chunks that end anywhere in a block."""
    engine = Engine(folder, budget_tokens=9)
    answers = engine.run(prompts[0])
    assert engine.runner.expanded[:6] == [[9], [9], [9], [8], [2], []]
    return answers


def in_company(folder: Path, prompts: list[list[int]]) -> list[Answer]:
    """Beside requests of other lengths, some of which prefill in chunks while others decode."""
    engine = Engine(folder, budget_tokens=20, max_chunk_tokens=7)
    answers = engine.run(*prompts)
    steps = zip(engine.runner.expanded, engine.runner.absorbed, strict=True)
    assert any(expanded and absorbed for expanded, absorbed in steps), "no step had both forms"
    assert [1, 1, 1] in engine.runner.absorbed
    return answers


def with_a_prefix_hit(folder: Path, prompts: list[list[int]]) -> list[Answer]:
    """A request that shares 32 tokens with one before it, and one that shares all but the last."""
    engine = Engine(folder)
    answers = engine.run(prompts[0]) + engine.run(prompts[0][:32] + prompts[1]) + engine.run(prompts[0])
    assert [answer.finish.cached_tokens for answer in answers if answer.finish] == [0, 32, 36]
    assert engine.runner.admitted_at == [0, 32, 36]
    return answers


def preempted(folder: Path, prompts: list[list[int]]) -> list[Answer]:
    """Thrown out for want of blocks, and all recomputed in chunks: the prompt expanded, the output absorbed."""
    engine = Engine(folder, num_blocks=22, budget_tokens=10, prefix_caching=False)
    answers = engine.run(*prompts)
    assert engine.core.stats().preemptions > 0
    assert any(answer.finish.preemptions for answer in answers if answer.finish)
    assert max(max(lengths, default=0) for lengths in engine.runner.absorbed) > 1, "no output was recomputed"
    return answers


def preempted_and_found_again(folder: Path, prompts: list[list[int]]) -> list[Answer]:
    """With the prefix cache, what is left of the victim's blocks is taken up again."""
    engine = Engine(folder, num_blocks=22)
    answers = engine.run(*prompts)
    assert engine.core.stats().preemptions > 0
    assert max(engine.runner.admitted_at) > 0, "nothing was found again"
    return answers


def resumed(folder: Path, prompts: list[list[int]]) -> list[Answer]:
    """An answer of which ten tokens are known: anew, and over the blocks that hold them."""
    whole, fresh = Engine(folder), Engine(folder)
    (answer,) = whole.run(prompts[0])
    output = answer.tokens[:10]
    anew, again = fresh.run(prompts[0], output=output)[0], whole.run(prompts[0], output=output)[0]
    assert (fresh.runner.expanded[0], fresh.runner.absorbed[0]) == ([37], [10])
    assert whole.runner.admitted_at == [0, 44], "the blocks of the generated tokens were not found"
    return [anew, again]


WAYS = [in_one_go, in_chunks, in_company, with_a_prefix_hit, preempted, preempted_and_found_again, resumed]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_the_core_agrees_with_transformers(
    checkpoints: Checkpoints, name: str, way: Callable[[Path, list[list[int]]], list[Answer]]
) -> None:
    agree_with(name, *way(checkpoints(name), make_prompts(name)))


@pytest.mark.parametrize("name", NAMES)
def test_llm_agrees_with_transformers(checkpoints: Checkpoints, name: str) -> None:
    count = vocab_size(name)
    params = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True, logprobs=count)
    settings = {"kv_cache_gib": 0.001, "max_model_len": MAX_MODEL_LEN, "block_tokens": BLOCK_TOKENS}
    frontend = FrontendConfig(max_logprobs=count)
    with LLM(checkpoints(name), dtype="float32", threads=1, frontend=frontend, **settings) as llm:
        agree_with(name, *map(as_answer, llm.generate(make_prompts(name), params)))


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_scored_as_transformers_scores_them(checkpoints: Checkpoints, name: str) -> None:
    """The whole vocabulary at each place; in one step and in many, block by block, with the same bits."""
    count, prompts = vocab_size(name), make_prompts(name)
    settings = {"kv_cache_gib": 0.001, "max_model_len": MAX_MODEL_LEN, "block_tokens": BLOCK_TOKENS}
    frontend, found = FrontendConfig(max_logprobs=count), []
    for budget_tokens in (1024, 9):
        given = {"dtype": "float32", "threads": 1, "frontend": frontend, "budget_tokens": budget_tokens}
        with LLM(checkpoints(name), **given, **settings) as llm, pytest.MonkeyPatch.context() as patch:
            patch.setattr(scoring, "BLOCK_ROWS", 7)
            llm.generate(prompts, max_tokens=1)  # whose blocks must not be found
            outputs = llm.generate(prompts, max_tokens=2, temperature=0.0, prompt_logprobs=count)
        found.append([output.prompt_logprobs for output in outputs])
        assert [output.usage.cached_tokens for output in outputs] == [0, 0, 0]
    if registry.default_instruction_set != "reference" and registry.has_native():  # which is exact
        assert found[0] == found[1]
    for prompt, *ways in zip(prompts, *found, strict=True):
        for entries in ways:
            agree_with_scores(prompt, entries, oracle_logits(name, prompt))


def agree_with_scores(prompt: list[int], entries: list[TokenLogprobs] | None, logits: Tensor) -> None:
    """`agree`, for the entries of a prompt; each token's is the one in its place's list, bit for bit."""
    assert entries is not None
    assert [entry.token_id for entry in entries] == prompt[1:]
    expected, tolerance = logits[:-1].log_softmax(-1), 2e-4 * float(logits.abs().max())
    top_ids = torch.tensor([entry.top_token_ids for entry in entries])
    top = torch.tensor([entry.top_logprobs for entry in entries])
    assert (top - expected.gather(1, top_ids)).abs().max() <= tolerance
    assert (top - expected.topk(top.shape[1]).values).abs().max() <= tolerance
    for entry in entries:
        assert entry.logprob == entry.top_logprobs[entry.top_token_ids.index(entry.token_id)]


def test_positions_beyond_8192(checkpoints: Checkpoints) -> None:
    """A prompt in chunks of 2048, an answer across Small 4's original context, and a hit that ends below it."""
    engine = Engine(checkpoints(FAR), num_blocks=280, block_tokens=32, max_model_len=8300, budget_tokens=2048)
    prompt = random.Random(1).choices(range(vocab_size(FAR)), k=8180)
    (first,) = engine.run(prompt)
    (second,) = engine.run(prompt + first.tokens)  # what was generated comes again as prompt
    assert engine.runner.expanded[:4] == [[2048], [2048], [2048], [2036]]
    assert engine.runner.admitted_at == [0, 8160]
    logits = oracle_logits(FAR, second.known + second.tokens[:-1])
    agree(first, logits[: len(second.known) - 1])
    agree(second, logits)


def as_answer(output: Output) -> Answer:
    """Sample 0."""
    assert output.logprobs is not None
    return Answer(output.prompt_token_ids, output.token_ids, output.logprobs)


# --- the demo model: text in, text out ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2_llm(smollm2: Path) -> Iterator[LLM]:
    """The demo model in float32, with small chunks."""
    settings = {"max_model_len": 512, "kv_cache_gib": 0.25, "budget_tokens": 64, "max_chunk_tokens": 16}
    with LLM(smollm2, dtype="float32", threads=1, **settings) as llm:
        yield llm


def agree_with_smollm2(oracle: Any, output: Output) -> None:
    """`agree`, with the model that transformers reads from the original file."""
    answer = as_answer(output)
    with torch.inference_mode():
        agree(answer, oracle(torch.tensor([answer.known + answer.tokens[:-1]])).logits[0])


def test_texts_side_by_side(smollm2: Path, smollm2_llm: LLM, smollm2_oracle: Any) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    prompts = (DATA / "english_prompts.txt").read_text().splitlines()[:6]
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, logprobs=5)
    outputs = smollm2_llm.generate(prompts, params)
    for prompt, output in zip(prompts, outputs, strict=True):
        agree_with_smollm2(smollm2_oracle, output)
        assert output.prompt_token_ids == tokenizer.encode(prompt).ids
        assert output.text == tokenizer.decode(output.token_ids)

    word = outputs[0].text.split()[4]
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, stop=(word,))
    stopped = smollm2_llm.generate(prompts[0], params)[0]
    assert (stopped.finish_reason, stopped.samples[0].stop) == ("stop", word)
    assert stopped.text == outputs[0].text[: outputs[0].text.index(word)]
    assert stopped.token_ids == outputs[0].token_ids[: len(stopped.token_ids)]
    assert word in tokenizer.decode(stopped.token_ids)
    assert word not in tokenizer.decode(stopped.token_ids[:-1])


def test_a_question_is_answered(smollm2_llm: LLM, smollm2_oracle: Any) -> None:
    params = SamplingParams(max_tokens=32, temperature=0.0, logprobs=2)
    output = smollm2_llm.chat([{"role": "user", "content": "What is the capital of France?"}], params)
    agree_with_smollm2(smollm2_oracle, output)
    assert "Paris" in output.text
    assert output.finish_reason == "stop"

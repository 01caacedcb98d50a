"""lm-eval on the HTTP door: what it measures, held against our own log-probabilities and against transformers.

Three tasks of ours beside this file: choices (log-likelihoods of continuations), texts (of whole texts), answers
(greedy ones, of a text and of a chat). lm-eval finds the tokenizer at /tokenize and /tokenizer_info by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from cierzo.engine.frontend.client import SyncClient
from clients.served import MODEL, Failed, Served, run

TASKS = Path(__file__).with_name("tasks")
TOLERANCE = 5e-4  # of a token's log-probability in float32, beside transformers
WAYS = ((1, 1), (8, 1), (2, 4))  # requests at a time, prompts in each


class Scored(NamedTuple):
    """A continuation, and the log-likelihood that lm-eval found; is_greedy: None where it does not say."""

    context: str
    continuation: str
    value: float
    is_greedy: bool | None


class Model:
    """The demo model as transformers computes it, and as the server says it over the RPC."""

    def __init__(self, checkpoint: Path, client: SyncClient) -> None:
        self._client = client
        self._model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._first = client.tokenize(text=client.tokenizer_info().bos_token, control_tokens=True)[0]

    def tokens(self, scored: Scored) -> tuple[list[int], int]:
        """The tokens that lm-eval asks for, and how many of them are context: one, before a whole text."""
        whole = self._client.tokenize(text=scored.context + scored.continuation, special_tokens=False)
        if not scored.context:
            return [self._first, *whole], 1
        return whole, len(self._client.tokenize(text=scored.context, special_tokens=False))

    def ours(self, token_ids: list[int], num_context: int) -> tuple[float, bool]:
        """The log-likelihood over the RPC, and whether each token is the likeliest."""
        asked = self._client.complete(token_ids=token_ids, prompt_logprobs=1, max_tokens=1, temperature=0.0)
        entries = asked.prompt_logprobs[num_context - 1 :]
        greedy = all(entry.logprob == max(entry.top_logprobs) for entry in entries)
        return sum(entry.logprob for entry in entries), greedy

    @torch.inference_mode()
    def theirs(self, token_ids: list[int], num_context: int) -> float:
        """The log-likelihood by transformers."""
        rows = self._model(torch.tensor([token_ids])).logits[0].log_softmax(-1)
        places = range(num_context, len(token_ids))
        return float(sum(rows[place - 1, token_ids[place]].item() for place in places))

    def answer(self, question: str, *, is_chat: bool) -> str:
        """The greedy answer over the RPC, to a text or to a turn."""
        prompt = {"messages": [{"role": "user", "content": question}]} if is_chat else {"text": question}
        return self._client.ask(**prompt, stop=[".", "\n"], max_tokens=24, temperature=0.0).text


def measure(environment: Path, checkpoint: Path, folder: Path) -> Iterator[str]:
    """Run it in all ways; lines that tell what it measured. Raises Failed where it disagrees."""
    with (
        Served(checkpoint, folder / "server.log", dtype="float32") as server,
        SyncClient(server.rpc) as client,
    ):
        model = Model(checkpoint, client)
        seen = None
        for at_once, batch in WAYS:
            found = _scores(_run(environment, folder, server, "completions", "choices,texts", at_once, batch))
            if seen is not None and found != seen:
                raise Failed(f"other log-likelihoods with {at_once} requests of {batch} prompts at a time")
            seen = found
        assert seen is not None
        yield f"{len(seen)} log-likelihoods, the same bits in each of {len(WAYS)} ways (requests, prompts): {WAYS}"
        yield _compared(model, seen)
        for endpoint in ("completions", "chat/completions"):
            samples = _run(environment, folder, server, endpoint, "answers", 2, 1)
            for sample in samples:
                expected = model.answer(sample["doc"]["question"], is_chat=endpoint != "completions")
                if (told := sample["resps"][0][0]) != expected:
                    raise Failed(f"{endpoint}: {told!r}, and over the RPC {expected!r}")
            yield f"{len(samples)} greedy answers of /v1/{endpoint}, as over the RPC: {sample['resps'][0][0]!r}"


def _compared(model: Model, found: list[Scored]) -> str:
    """Hold each against both. Raises Failed."""
    worst, num_tokens = 0.0, 0
    for scored in found:
        token_ids, num_context = model.tokens(scored)
        ours, greedy = model.ours(token_ids, num_context)
        if ours != scored.value or scored.is_greedy not in (greedy, None):
            raise Failed(f"{scored}: over the RPC it is {ours}, greedy: {greedy}")
        count = len(token_ids) - num_context
        off = abs(model.theirs(token_ids, num_context) - ours) / count
        if off > TOLERANCE:
            raise Failed(f"{scored}: transformers is off by {off:.2g} a token, more than {TOLERANCE}")
        worst, num_tokens = max(worst, off), num_tokens + count
    return f"{num_tokens} tokens: equal to the RPC's sums; beside transformers at most {worst:.1e} off a token"


def _run(
    environment: Path, folder: Path, server: Served, endpoint: str, tasks: str, at_once: int, batch: int
) -> list[dict]:
    """Samples of a run, in the order of the tasks' documents."""
    is_chat = endpoint != "completions"
    output = folder / f"{endpoint.replace('/', '-')}-{tasks.replace(',', '-')}-{at_once}-{batch}"
    options = f"model={MODEL},base_url={server.url}/v1/{endpoint},num_concurrent={at_once}"
    command = [
        *(environment / "bin" / "python", "-m", "lm_eval", "run"),
        *("--model", "local-chat-completions" if is_chat else "local-completions", "--model_args", options),
        *("--include_path", ".", "--tasks", ",".join(f"cierzo_{task}" for task in tasks.split(","))),
        *("--batch_size", batch, "--log_samples", "--output_path", output),
        *(["--apply_chat_template"] if is_chat else []),
    ]
    run(
        command,
        output.with_suffix(".log"),
        cwd=TASKS,
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        HF_HOME=str(folder / "huggingface"),
    )
    samples = []
    for task in tasks.split(","):
        (path,) = output.glob(f"*/samples_cierzo_{task}_*.jsonl")
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        samples += sorted(lines, key=lambda sample: sample["doc_id"])
    return samples


def _scores(samples: list[dict]) -> list[Scored]:
    """Log-likelihoods of samples; those of a whole text have no context."""
    found = []
    for sample in samples:
        for (_, asked), (told, *_) in zip(sorted(sample["arguments"].items()), sample["resps"], strict=True):
            if isinstance(told, str):
                found.append(Scored("", asked["arg_0"], float(told), None))
            else:
                found.append(Scored(asked["arg_0"], asked["arg_1"], float(told[0]), told[1] == "True"))
    return found

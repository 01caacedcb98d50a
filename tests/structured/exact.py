"""Answers with grammars beside all that a request may say: the same alone, beside others, and gone on with."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from random import Random
from typing import Any

from chaos.report import Report
from chaos.server import Server, serving
from random_schemas import Schemas

from cierzo.engine.errors import CierzoError
from cierzo.engine.messages import SampleEnd
from structured.asking import Asking, asking
from structured.judge import CannotJudge, fault

PATTERNS = ("([a-f]{2,5} ){1,9}", "(ab|a|b)*c", "[0-9]{3,40}", "(?s:.){4,30}", "x{0,9}(yy|z)")
SHOWN = 5
Asked = dict[str, Any]


def request(random: Random, number: int) -> Asked:
    """The arguments of a request, but for its seed."""
    asked: Asked = {"text": f"{number} {random.getrandbits(64)}", "max_tokens": random.choice((1, 5, 40, 150))}
    kind = random.choice(("json_schema", "json_schema", "regex", "choice", "lark", "json_object"))
    value: Any = {
        "json_schema": json.dumps(Schemas(random.getrandbits(32), 2).schema()),
        "regex": random.choice(PATTERNS),
        "choice": random.sample(["red", "reed", "r", "größe", "x y", "😀😀", "red "], random.randint(1, 5)),
        "lark": 'start: word ("," word)*\nword: /[a-z]{1,8}/ | "(" start ")"',
        "json_object": "",
    }[kind]
    asked["grammar"] = {"kind": kind, "value": value}
    for name, values in {
        "temperature": (0.0, 0.7, 1.5),
        "top_k": (0, 1, 7),
        "top_p": (1.0, 0.5),
        "min_p": (0.0, 0.1),
        "repetition_penalty": (1.0, 1.3),
        "presence_penalty": (0.0, 1.0),
        "min_tokens": (0, 0, 1, 6),
        "stop": ((), (), ("e",), ("12", "zz")),
        "bad_words": ((), (), ("a",), ("r", "0")),
        "logprobs": (None, None, 2),
        "ignore_eos": (False, False, True),
    }.items():
        asked[name] = random.choice(values)
    asked["min_tokens"] = min(asked["min_tokens"], asked["max_tokens"])
    return asked


def holds(grammar: dict[str, Any], text: str) -> bool:
    """Whether a text that ended by itself is what it was asked to be."""
    value = grammar["value"]
    match grammar["kind"]:
        case "regex":
            return re.fullmatch(value, text) is not None
        case "choice":
            return text in value
        case "json_schema":
            try:
                return not fault(json.loads(value), text)
            except CannotJudge:
                return True
        case "json_object":
            return isinstance(json.loads(text), dict)
    return re.fullmatch(r"[a-z,()]+", text) is not None and text.count("(") == text.count(")")


class _Round:
    """What came of all requests, of one server. said: by number."""

    def __init__(self) -> None:
        self.said: dict[int, tuple[Any, ...]] = {}
        self.wrong: list[str] = []
        self.counts = Counter[str]()


async def _again(asked: Asking, number: int, seed: int, round_: _Round) -> None:
    wrong, counts = round_.wrong, round_.counts
    random = Random(seed * 1_000_003 + number)
    what = request(random, number)
    first = await asked.answer(what["grammar"], number, **_without(what))
    if isinstance(first, CierzoError):
        counts["refused"] += 1
        if first.http_status != 400:
            wrong.append(f"{number}: {first.code}: {first.message}")
        return
    counts[first.finish_reason] += 1
    round_.said[number] = _said(first)
    counts["incomplete"] += first.incomplete
    is_cut = isinstance(first.stop, str)
    if (
        first.finish_reason == "stop"
        and not is_cut
        and not first.incomplete
        and not holds(what["grammar"], first.text)
    ):
        wrong.append(f"{number}: {first.text!r} is not {what['grammar']}")
    if first.finish_reason == "stop" and first.incomplete and not is_cut:
        wrong.append(f"{number}: it ended by itself, and is incomplete: {first.text!r}")
    if first.finish_reason == "failed":
        if "token" not in first.message:
            wrong.append(f"{number}: failed, and does not say where: {first.message}")
        return
    await _alike(asked, number, what, first, random, wrong)


async def _alike(
    asked: Asking, number: int, what: Asked, first: SampleEnd, random: Random, wrong: list[str]
) -> None:
    """Ask for the same two other ways: beside others, and from a token in the middle."""
    twice = await asked.client.complete(**asked.arguments(what["grammar"], number), **_without(what), n=2)
    if (told := _said(twice.samples[0])) != _said(first):
        wrong.append(f"{number}: {_said(first)} alone, {told} as one of two, of {what}")
    if len(first.token_ids) < 2 or is_over(first):
        return
    cut = random.randrange(1, len(first.token_ids))
    try:
        rest = await asked.client.complete(
            **asked.arguments(what["grammar"], number), **_without(what), output_token_ids=first.token_ids[:cut]
        )
    except CierzoError as error:
        wrong.append(f"{number}: not gone on with from {cut}: {error.message}")
        return
    if (told := _said(rest.samples[0])) != _said(first):  # its text is what is new
        wrong.append(f"{number}: {_said(first)}, and from {cut} {told}, of {what}")


def is_over(sample: SampleEnd) -> bool:
    """Whether it ended by a stop string, behind which the engine may have had more tokens."""
    return isinstance(sample.stop, str)


def _said(sample: SampleEnd) -> tuple[Any, ...]:
    return sample.token_ids, sample.finish_reason, sample.stop, sample.incomplete


def _without(what: Asked) -> Asked:
    return {name: value for name, value in what.items() if name != "grammar"}


def run(count: int = 400, seed: int = 0) -> bool:
    """The whole of it, with steps one after the other and with overlapped ones; whether all was well."""
    report, rounds = Report("exact"), []
    for overlap in ("off", "on"):
        found = _Round()
        with serving(words=True, overlap=overlap) as server:
            asyncio.run(_all_of_it(server, count, seed, found))
        told = ", ".join(f"{number:,} {what}" for what, number in sorted(found.counts.items()))
        report.say(f"overlap {overlap}: {told}")
        report.say("\n  ".join(found.wrong[:SHOWN]))
        report.need("answers that are wrong, or others when asked for again", len(found.wrong), 0)
        rounds.append(found.said)
    others = [number for number, said in rounds[0].items() if rounds[1].get(number) != said]
    report.need("answers that are others with overlapped steps", others, [])
    return report.verdict()


async def _all_of_it(server: Server, count: int, seed: int, found: _Round) -> None:
    async with asking(server) as asked, asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(_again(asked, number, seed, found))

"""Grammars that other engines stopped at, or died of, asked for beside streams that are to feel nothing of them."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from chaos.report import Report, percentile
from chaos.server import Server, resident_kb, serving
from chaos.talk import Body, Talk

STREAMS = 32
AT_ONCE = 4  # hostile requests
MORE_MS = 20.0
GROWN_MIB = 512
READ: Body = {"token_ids": [9, 9], "sampling": {"max_tokens": 2000, "ignore_eos": True, "seed": 2}}
REFUSED = ("invalid_request", "overloaded")  # what a hostile grammar may be answered, if it is not served


def _within(schema: Any, levels: int) -> str:
    """The JSON text of a schema within others, which no reader's recursion could write."""
    return '{"type":"array","items":' * levels + json.dumps(schema) + "}" * levels


def _doubling(levels: int) -> str:
    """A schema of 2 ** levels ways, all of them the same text."""
    each = {
        f"d{level}": {"anyOf": [{"$ref": f"#/$defs/d{level - 1}"}, {"$ref": f"#/$defs/d{level - 1}"}]}
        for level in range(1, levels)
    }
    return json.dumps({"$ref": f"#/$defs/d{levels - 1}", "$defs": {"d0": {"type": "string"}, **each}})


def _product(count: int) -> str:
    """Alternatives that hold all at once: their product has count ** 6 of them."""
    union = {"anyOf": [{"type": "object", "properties": {f"p{n}": {"const": n}}} for n in range(count)]}
    return json.dumps({"allOf": [union] * 6})


def _chain(count: int, number: int) -> str:
    """Definitions each of which needs the next: depth without brackets."""
    each = {f"d{n}": {"type": "array", "items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(count)}
    return json.dumps({"$ref": "#/$defs/d0", "$defs": {**each, f"d{count}": {"const": number}}})


def _lark(rules: str) -> Body:
    return {"kind": "lark", "value": rules}


def _regex(pattern: str) -> Body:
    return {"kind": "regex", "value": pattern}


def _schema(schema: Any) -> Body:
    return {"kind": "json_schema", "value": schema if isinstance(schema, str) else json.dumps(schema)}


# Name -> the grammar, another one for each number, so that none is found in a cache.
HOSTILE: dict[str, Callable[[int], Body]] = {
    "depth 10,000": lambda n: _schema(_within({"const": n}, 10_000)),
    "depth 1,000": lambda n: _schema(_within({"const": n}, 1_000)),
    "40,000 alternatives": lambda n: _lark("start: " + " | ".join(f'"a{n}b{each}"' for each in range(40_000))),
    "15,000 alternatives": lambda n: _lark("start: " + " | ".join(f'"{n}b{each}"' for each in range(15_000))),
    "9,000 rules": lambda n: _lark(
        "start: r0\n" + "\n".join(f'r{each}: "{n}" r{each + 1}' for each in range(9_000)) + '\nr9000: "x"'
    ),
    "40,000 choices": lambda n: {"kind": "choice", "value": [f"{n} {each}" for each in range(40_000)]},
    "enum of 50,000": lambda n: _schema({"enum": [f"{n}:{each}" for each in range(50_000)]}),
    "enum of 15,000": lambda n: _schema({"enum": [f"{n}:{each}" for each in range(15_000)]}),
    "500 properties": lambda n: _schema({"properties": {f"p{n}x{each}": {"type": "null"} for each in range(500)}}),
    "3,000 properties": lambda n: _schema(
        {"properties": {f"p{n}x{each}": {"type": "null"} for each in range(3_000)}}
    ),
    "what comes later": lambda n: _lark(f'start: "z{n}" ' + " ".join(['"a"?'] * 6_000)),
    "2,000 definitions": lambda n: _schema(_chain(2_000, n)),
    "x{100000}": lambda n: _regex(f"y{{{n + 1}}}x{{100000}}"),
    "counts within counts": lambda n: _regex(f"((a{{100}}b{{{n + 1}}}){{100}}c){{100}}"),
    "optional ones before as many": lambda n: _regex(f"(a?){{{500 + n}}}a{{{500 + n}}}"),
    "states that double": lambda n: _regex(f"[ab]*a[ab]{{{40 + n % 40}}}c"),
    "nothing at all": lambda n: _schema({"type": "integer", "minimum": n + 3, "maximum": n}),
    "two types at once": lambda n: _schema({"allOf": [{"type": "string"}, {"type": "integer", "minimum": n}]}),
    "an empty class": lambda n: _regex(f"a{{{n}}}[^\\x00-\\U0010ffff]"),
    "itself": lambda n: _schema({"$ref": "#", "title": str(n)}),
    "itself in a rule": lambda n: _lark(f'start: start | start start "{n}"'),
    "exponential unions": lambda n: _schema(_doubling(20 + n % 20)),
    "a product of unions": lambda n: _schema(_product(10 + n % 5)),
    "a rule of two of itself": lambda n: _lark(f'start: a "{n}"\na: a a | "x" | "x" a'),
    "many ways to read spaces": lambda n: _lark(f'start: (a | b | c)* "{n}"\na: " "+\nb: " "+\nc: (" " " ")+'),
    "a pattern that does not end": lambda n: _regex("(" * (200 + n)),
    "no UTF-8 and controls": lambda n: _regex("\x00\x7f" * (n + 1)),
    "another machine's schema": lambda n: _schema({"$ref": f"http://127.0.0.1:9/{n}.json"}),
    "a file of this machine": lambda n: _schema({"$ref": f"file:///etc/passwd#{n}"}),
    "a word of the house": lambda n: _lark(f'%llguidance {{"no_forcing": false}}\nstart: <[2]> "{n}"'),
    "300 kB": lambda n: _regex(f"{n}" + "a" * 300_000),
    "half of JSON": lambda n: _schema('{"a":[' * (n + 1)),
    "a look behind": lambda n: _regex(f"(?<=a)b{{{n}}}"),
    "not so": lambda n: _schema({"not": {"const": n}}),
}


class _Streams:
    """Streams that read, and the times between their deltas. `mark` forgets those so far."""

    def __init__(self, talk: Talk) -> None:
        self._talk = talk
        self._gaps: list[float] = []
        self._is_over = False

    def mark(self) -> list[float]:
        """The times since the last mark."""
        gaps, self._gaps = self._gaps, []
        return gaps

    def leave(self) -> None:
        """Ask for nothing more."""
        self._is_over = True

    async def read(self) -> None:
        """Be one stream after the other."""
        while not self._is_over:
            stream = self._talk.start(READ)
            answer, seen = self._talk.answers[stream], 1
            while answer.end is None and not self._is_over:
                await self._talk.deltas(stream, len(answer.times) + 10)
                self._gaps += [later - earlier for earlier, later in pairwise(answer.times[seen - 1 :])]
                seen = len(answer.times)
            self._talk.cancel(stream)
            end = await self._talk.finished(stream)
            assert end.reason in ("length", "cancelled"), end.end


async def _ask(talk: Talk, name: str, number: int, told: Counter[str]) -> None:
    """Ask for a hostile grammar; what became of it."""
    body = {"text": "x", "grammar": HOSTILE[name](number), "sampling": {"max_tokens": 64, "seed": number}}
    reason = (await talk.finished(talk.start(body))).reason
    told[f"{name}: {reason}"] += 1


async def _beside(
    server: Server, rounds: int, names: list[str], report: Report, *, judges_gaps: bool
) -> Counter[str]:
    told: Counter[str] = Counter()
    streaming, asking = (
        await Talk.connect(server.address),
        [await Talk.connect(server.address) for _ in range(AT_ONCE)],
    )
    streams = _Streams(streaming)
    readers = [asyncio.create_task(streams.read()) for _ in range(STREAMS)]
    await asyncio.sleep(1.0)
    without: list[float] = []
    beside: list[float] = []
    for number in range(rounds):
        for place, name in enumerate(names):
            streams.mark()
            await asyncio.sleep(0.25)
            without += streams.mark()
            began_s = time.monotonic()
            await asyncio.gather(*(_ask(talk, name, AT_ONCE * number + n, told) for n, talk in enumerate(asking)))
            took_s, gaps = time.monotonic() - began_s, streams.mark()
            beside += gaps
            worst = max(gaps, default=0.0) * 1e3
            if not number:
                report.say(f"{place + 1:2} {name}: {took_s:.2f} s, worst gap beside it {worst:.1f} ms")
    streams.leave()
    await asyncio.gather(*readers)
    for talk in (streaming, *asking):
        talk.close()
    _judge(report, without, beside, judges_gaps=judges_gaps)
    return told


def _judge(report: Report, without: list[float], beside: list[float], *, judges_gaps: bool) -> None:
    """Hold the times between tokens against a step and some more; the machine's own hiccups are in both."""
    step_ms = percentile(without, 50) * 1e3
    own_ms, worst_ms = (max(gaps) * 1e3 for gaps in (without, beside))
    report.say(f"a step: {step_ms:.1f} ms; {len(without):,} gaps without, {len(beside):,} beside")
    report.say(f"worst gap: {own_ms:.1f} ms without, {worst_ms:.1f} ms beside")
    if not judges_gaps:
        return
    ninety_nine = percentile(beside, 99) * 1e3
    report.at_most("gap that 99 of 100 keep", ninety_nine, step_ms + MORE_MS, "ms")
    report.at_most("worst gap", worst_ms, max(own_ms, step_ms) + MORE_MS, "ms")


def run(rounds: int = 2, names: list[str] | None = None, *, judges_gaps: bool = True) -> bool:
    """The whole of it; whether all was well. judges_gaps: the times between the streams' tokens count, too."""
    report = Report("hostile grammars")
    # So much room that no stream is ever preempted, which would be a gap of its own.
    with serving(words=True, kv_cache_gib=0.5, max_frame_bytes=16 * 1024 * 1024) as server:
        core, before_kb = server.core, resident_kb(server.front_end)
        asked = _beside(server, rounds, names or [*HOSTILE], report, judges_gaps=judges_gaps)
        told = asyncio.run(asked)
        for outcome, count in told.items():
            report.say(f"{outcome} ({count})")
        ends = {outcome.rpartition(": ")[2] for outcome in told}
        report.need("ends of another kind", sorted(ends - {*REFUSED, "stop", "length", "failed"}), [])
        report.need("the core", server.core, core)
        grown = (resident_kb(server.front_end) - before_kb) / 1024
        report.at_most("memory of the front end grew by", grown, GROWN_MIB, "MiB")
    return report.verdict()

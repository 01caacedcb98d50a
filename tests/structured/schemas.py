"""Random schemas, and those of the public JSON-Schema-Test-Suite: each whole answer validates by jsonschema."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chaos.server import serving

from cierzo.engine.errors import CierzoError
from structured.asking import asking
from structured.judge import CannotJudge, fault

from random_schemas import Schemas  # isort: skip

SUITE = "jsonschema==4.26.0"  # whose source archive carries the suite
DRAFTS = ("draft2020-12", "draft2019-09", "draft7", "draft6", "draft4")
ANOTHER_DIALECT = "ecmascript-regex"  # patterns of ECMAScript's words: the judge reads Python's
MAX_TOKENS = 192
ANSWERS = 2  # of each schema
LEAST_WHOLE = 0.6  # of the answers that were begun; the others met max_tokens


def random_schemas(count: int, first_seed: int = 0) -> Iterator[tuple[str, Any]]:
    """So many schemas, by the seeds that make them again."""
    for seed in range(first_seed, first_seed + count):
        yield f"seed {seed}", Schemas(seed).schema()


def suite_schemas(folder: Path) -> Iterator[tuple[str, Any]]:
    """The schemas of the public suite, by their places in it. It is fetched into `folder` if it is not there."""
    tests = folder / SUITE.replace("==", "-") / "json" / "tests"
    if not tests.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        subprocess.run([*command, "--no-deps", "--no-binary", ":all:", "--dest", str(folder), SUITE], check=True)
        with tarfile.open(folder / f"{SUITE.replace('==', '-')}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    for draft in DRAFTS:
        for path in sorted((tests / draft).rglob("*.json")):
            for case in json.loads(path.read_text(encoding="utf-8")):
                if isinstance(case["schema"], dict) and path.stem != ANOTHER_DIALECT:
                    schema = {"$schema": _DIALECT[draft], **case["schema"]}
                    yield f"{draft} {path.stem}: {case['description']}", schema


_DIALECT = {
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
    "draft2019-09": "https://json-schema.org/draft/2019-09/schema",
    "draft7": "http://json-schema.org/draft-07/schema#",
    "draft6": "http://json-schema.org/draft-06/schema#",
    "draft4": "http://json-schema.org/draft-04/schema#",
}


def run(name: str, schemas: Iterator[tuple[str, Any]], **options: Any) -> bool:
    """Have each schema answered; whether all whole answers validate, and enough are whole."""
    with serving(words=True, **options) as server:
        began_s = time.monotonic()
        counts, wrong = asyncio.run(_ask(server, schemas))
        seconds = time.monotonic() - began_s
    told = ", ".join(f"{count:,} {what}" for what, count in sorted(counts.items()))
    print(f"  {name}: {told}; {seconds:.0f} s", flush=True)
    for line in wrong[:20]:
        print(f"  WRONG {line}")
    begun = counts["whole"] + counts["cut"]
    return not wrong and not counts["failed"] and counts["whole"] >= LEAST_WHOLE * begun > 0


async def _ask(server: Any, schemas: Iterator[tuple[str, Any]]) -> tuple[Counter[str], list[str]]:
    counts: Counter[str] = Counter()
    wrong: list[str] = []

    async def each(place: str, schema: Any, seed: int) -> None:
        grammar = {"kind": "json_schema", "value": json.dumps(schema)}
        answer = await asked.answer(grammar, seed, text="Say it.", max_tokens=MAX_TOKENS, temperature=1.0)
        if isinstance(answer, CierzoError):
            counts["refused"] += 1
            if answer.http_status != 400:
                wrong.append(f"{place}: {answer.code}: {answer.message}")
            return
        reason = answer.finish_reason
        kind = "whole" if reason == "stop" else "cut" if reason == "length" else "failed"
        counts[kind] += 1
        if kind == "failed":
            wrong.append(f"{place}: {reason}: {answer.message}")
        try:
            what = fault(schema, answer.text)
        except CannotJudge:
            counts["not judged"] += 1
            return
        if kind == "cut" and not answer.incomplete and what:
            wrong.append(f"{place}: cut, and not told as incomplete: {answer.text!r}")
        if kind == "whole" and what:
            wrong.append(f"{place}: {what}: {answer.text!r} of {json.dumps(schema)[:500]}")

    async with asking(server) as asked, asyncio.TaskGroup() as group:
        for place, schema in schemas:
            counts["schemas"] += 1
            for seed in range(ANSWERS):
                group.create_task(each(place, schema, seed))
    return counts, wrong

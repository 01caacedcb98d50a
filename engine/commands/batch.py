"""`cierzo batch`: a file of requests, answered by a running server without anybody waiting."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from typing import Annotated

import msgspec
import uvloop
from msgspec import Meta
from tqdm import tqdm

from cierzo.engine.frontend.client import Client, ConnectOptions, Reconnect
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.gateway.batch import PATIENCE, Asker
from cierzo.engine.gateway.batch_files import Files, Work
from cierzo.engine.gateway.config import HttpConfig
from cierzo.engine.gateway.sse import together
from cierzo.engine.options import Access, access, add_options, chosen

ENVELOPE_BYTES = 64 * 1024  # of a line, around its body
OF_HTTP = (
    *("served_model_name", "reasoning_format", "lenient"),
    *("max_body_bytes", "max_body_depth", "max_prompts", "max_whole_bytes", "max_joined_bytes"),
)
OTHERS = {*HttpConfig.__struct_fields__}.difference(OF_HTTP)


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a run."""

    concurrency: Annotated[int, Meta(ge=1, le=4096, description="lines that are asked at a time")] = 64
    away_s: Annotated[
        float, Meta(gt=0, description="seconds for which a server that has gone is waited for, at least")
    ] = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the files, the servers, and what may stand in a line."""
    told = 'requests, one a line: {"custom_id", "method": "POST", "url": "/v1/chat/completions", "body"}'
    parser.add_argument("requests", metavar="IN", help=told)
    told = "answers, appended as they come; those that stand in it already are not asked for again"
    parser.add_argument("answers", metavar="OUT", help=told)
    servers = parser.add_argument_group("servers")
    told = "a server of the model; may be repeated for several of them"
    servers.add_argument("--rpc", action="append", metavar="HOST:PORT|unix:PATH", help=told)
    add_options(servers, Access)
    add_options(parser, Pace)
    add_options(parser.add_argument_group("requests"), HttpConfig, skip=OTHERS)


def run(arguments: argparse.Namespace) -> int:
    """Answer the requests. The exit status is 1 if an answer is an error, of an earlier run too."""
    config = HttpConfig(**chosen(arguments, HttpConfig, skip=OTHERS))
    pace, options = Pace(**chosen(arguments, Pace)), access(arguments)
    rpc = arguments.rpc or [FrontendConfig().address]
    most = config.max_body_bytes + ENVELOPE_BYTES
    with (
        open(arguments.requests, "rb") as requests,
        open(arguments.answers, "ab+", buffering=0) as answers,
        Files(requests, answers, most) as files,
    ):
        standing = files.num_standing
        total = files.num_lines()
        with tqdm(total=total, unit="line", delay=2.0, disable=None, leave=False) as bar:
            uvloop.run(Batch(files, bar).run(rpc, options, config, pace))
        told = f", {standing} of them before" if standing else ""
        print(f"{files.num_standing} answers{told}, {files.num_errors} of all are errors: {arguments.answers}")
        return 1 if files.num_errors else 0


class Batch:
    """A run over the files."""

    def __init__(self, files: Files, bar: tqdm) -> None:
        self._files = files
        self._bar = bar

    async def run(self, rpc: list[str], options: ConnectOptions, config: HttpConfig, pace: Pace) -> None:
        """Have every line answered. Raises the CierzoError for which that cannot be."""
        reconnect = Reconnect(max_attempts=2**31, within_s=pace.away_s)
        lasting: ConnectOptions = {**options, "retry": PATIENCE, "reconnect": reconnect}
        async with await Client.connect(rpc, **lasting) as client:
            asker = Asker(client, config, self._files.salt)
            lines = self._files.lines()
            try:
                await together(*(self._answer(asker, lines) for _ in range(pace.concurrency)))
            finally:
                asker.close()

    async def _answer(self, asker: Asker, lines: Iterator[Work | None]) -> None:
        """Have lines answered, one after the other, of those that others leave."""
        for work in lines:
            if work is None:
                await asyncio.sleep(0)  # many in a row are to hold nobody up
            elif work.line is None:
                self._files.write(work)
                await asyncio.sleep(0)
            else:
                self._files.write(work, await asker.answer(work.line, self._files.request_id(work)))
            self._bar.update()

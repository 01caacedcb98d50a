"""`cierzo serve`: the front end in this process, the core in another, and what signals mean."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import uvloop

from cierzo.engine.config import EngineConfig, EngineOptions, resolve
from cierzo.engine.errors import CoreFailed, refusal
from cierzo.engine.frontend.address import parse_address
from cierzo.engine.frontend.child import Spawn
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.core_link import CoreLink, spawn_worker
from cierzo.engine.frontend.encoders import Encoders
from cierzo.engine.frontend.encoding import Setup
from cierzo.engine.frontend.flights import Flights
from cierzo.engine.frontend.frontend import Frontend
from cierzo.engine.frontend.observe.web import MetricsServer, metrics_address
from cierzo.engine.frontend.rpc import RpcServer
from cierzo.engine.gateway.config import NO_HTTP, HttpConfig, check_http
from cierzo.engine.log_lines import LineQueue, queued_lines
from cierzo.engine.messages import ModelInfo, VisionInfo
from cierzo.engine.server_process import prepare_memory, return_large_blocks
from cierzo.engine.text.grammar import vocabulary_of
from cierzo.engine.text.image_tokens import MEAN, STD
from cierzo.engine.text.prompt import PromptEncoder, reads_tekken

if TYPE_CHECKING:
    from cierzo.engine.gateway.server import HttpServer

log = logging.getLogger(__name__)

HEALTH_CHECK_S = 0.5
SPARE_FILES = 64  # descriptors besides the connections: sockets to the core, logs, libraries


def serve(options: EngineOptions, http: HttpConfig = NO_HTTP) -> int:
    """Serve until SIGINT or SIGTERM, or until the core dies too often. Gives the exit status. http: the HTTP door.

    Raises ConfigError (the port in use included) and CheckpointError before anything is served.
    """
    with queued_lines(options.frontend.log_format) as lines:
        config = resolve(options)
        parse_address(config.frontend.address)  # refused before anything is made of it
        metrics_address(config.frontend)
        check_http(http)
        _allow_files(config.frontend.max_connections * (2 if http.http else 1) + SPARE_FILES)
        return uvloop.run(_serve(config, lines=lines, http=http))


def _allow_files(wanted: int) -> None:
    """Raise this process's limit of open files to what the connections need; ConfigError if that is not allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and wanted > hard:
        why = f"the system allows {hard} open files, {SPARE_FILES} of which are for other things"
        raise refusal("max_connections", f"at most {hard - SPARE_FILES}", wanted - SPARE_FILES, why)
    if soft != resource.RLIM_INFINITY and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _say(text: str) -> None:
    """Print what a server says of itself. A disk that is full under it is no reason not to serve."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        log.warning("the standard output takes nothing (%s); it would say: %s", error.strerror, text)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, what is kept of the old one is not tried again at the end


async def _serve(
    config: EngineConfig,
    spawn: Spawn = spawn_worker,
    lines: LineQueue | None = None,
    http: HttpConfig = NO_HTTP,
) -> int:
    """Bind first, so that an address that cannot be had is all that is told; take requests once the weights are
    read."""
    signals = _signals()
    loop, hangups = asyncio.get_running_loop(), list[signal.Signals]()
    loop.add_signal_handler(signal.SIGHUP, hangups.append, signal.SIGHUP)
    config, prompts = load_prompts(config)
    config, recorder = with_flight_folder(config)
    flights = Flights.under(config.flight_folder, config.record_prompts)
    model = model_info(config, prompts)
    table = vocabulary_of(prompts, model)
    link = CoreLink(config.frontend, config, spawn, flights=flights, vocabulary=table)
    checkpoint = config.checkpoint if prompts.tokenizer is not None else ""
    setup = Setup(checkpoint=checkpoint, tokenizer=config.tokenizer, frontend=config.frontend, model=model)
    encoders = Encoders(config.frontend, setup)
    frontend = Frontend(config.frontend, model, prompts, link, encoders)
    if lines is not None:
        frontend.observer.num_lost_lines = lines.lost
    server, metrics = RpcServer(config.frontend, frontend), MetricsServer(config.frontend, frontend)
    door = None
    try:
        await server.start()
        loop.add_signal_handler(signal.SIGHUP, server.reload)
        if hangups:  # that came after the keys were read
            server.reload()
        await metrics.start()
        door = await open_http(http, server, prompts, metrics)
        address = "" if door is None else door.address
        who = describe_door(config.frontend, len(server.door.tenants), metrics.address, address)
        _say(config.describe() + recorder + who)
        encoders.start()
        startup = await _first(link.start(frontend.core), signals.get())
        if isinstance(startup, signal.Signals):
            return 0 if startup == signal.SIGTERM else 128 + startup
        if table is not None:
            encoders.warm()
        prepare_memory()
        return_large_blocks()
        _say(f"{startup}\nready: {config.name} at {server.address}")
        return await _until_stopped(signals, frontend)
    finally:
        if door is not None:
            await door.close()
        await server.close()
        await metrics.close()
        await frontend.close()
        await encoders.close()
        await link.close()


def _signals() -> asyncio.Queue[signal.Signals]:
    """SIGINT and SIGTERM, as they come."""
    queue: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, queue.put_nowait, number)
    return queue


async def _until_stopped(signals: asyncio.Queue[signal.Signals], frontend: Frontend) -> int:
    """SIGINT stops at once; SIGTERM drains, until the drain is over or a second signal comes."""
    reason = await _first(signals.get(), _failed(frontend))
    if reason is None:
        raise CoreFailed("the core died too often; see the log above")
    log.info("%s: the server %s", reason.name, "drains" if reason == signal.SIGTERM else "stops at once")
    if reason == signal.SIGTERM:
        frontend.drain(for_good=True)
        if (second := await _first(frontend.drained(), signals.get())) is not None:
            log.info("%s: the drain ends before its time", second.name)
    frontend.interrupt()
    log.info("the server exits with status 0")
    return 0


async def _failed(frontend: Frontend) -> None:
    while frontend.health != "failed":
        await asyncio.sleep(HEALTH_CHECK_S)


async def open_http(
    config: HttpConfig, server: RpcServer, prompts: PromptEncoder, metrics: MetricsServer
) -> HttpServer | None:
    """The HTTP door in front of this process's engine, open, if there is to be one. Raises ConfigError."""
    if not config.http:
        return None
    from cierzo.engine.gateway.embedded import Embedded  # who serves no HTTP need not have its packages
    from cierzo.engine.gateway.server import HttpServer

    backends = Embedded(server, prompts, metrics.metrics)
    door = HttpServer(config, server.config, backends, server.tls)
    await door.start()
    return door


async def _first(*awaitables: Coroutine[Any, Any, Any]) -> Any:
    """The result of whatever ends first; the others are cancelled, and their end is waited for."""
    tasks = [asyncio.ensure_future(each) for each in awaitables]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(task for task in tasks if task.done()).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def describe_door(config: FrontendConfig, num_tenants: int, metrics: str, http: str = "") -> str:
    """Lines of the banner that say who may come, and where what is told. metrics, http: the addresses that were
    bound."""
    clients = f", clients show one that {config.tls_client_ca} vouches for" if config.tls_client_ca else ""
    rows = (
        ("keys", config.keys, f"{config.keys} (tenants: {num_tenants})"),
        ("TLS", config.tls_certificate, f"{config.tls_certificate}{clients}"),
        ("HTTP", http, http),
        ("metrics", config.metrics, metrics),
        ("usage file", config.usage_file, config.usage_file),
    )
    return "".join(f"\n{key:<14} {text}" for key, is_set, text in rows if is_set)


def with_flight_folder(config: EngineConfig) -> tuple[EngineConfig, str]:
    """The settings, without a flight recorder if its folder cannot be written; what the banner then says of it."""
    folder = config.flight_folder
    if not folder:
        return config, ""
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return config, ""
    except OSError as error:
        line = f"\n{'flight record':<14} off: {folder}: {error.strerror or error}"
        return msgspec.structs.replace(config, flight_folder=""), line


def load_prompts(config: EngineConfig) -> tuple[EngineConfig, PromptEncoder]:
    """Tokenizer and chat template of a checkpoint, and the settings with the tokenizer's own eos_token among the
    ids that end a generation: a fine-tune may end its turns with a token that its config.json does not name.

    Raises CheckpointError.
    """
    folder, model = Path(config.checkpoint), config.model
    kind = "mistral" if reads_tekken(folder, config.tokenizer) else "tokenizers"
    prompts = PromptEncoder.load(folder, config.tokenizer, model.vocab_size)
    config = msgspec.structs.replace(config, tokenizer=kind)
    for note in prompts.notes():
        log.warning("%s", note)
    tokenizer = prompts.tokenizer
    if tokenizer is None or not tokenizer.eos_token:
        return config, prompts
    token_id = tokenizer.eos_token_id
    if token_id is None or token_id >= model.vocab_size:
        known = "not in tokenizer.json" if token_id is None else f"id {token_id}"
        text = "the tokenizer's eos_token %r, %s, is left out: a vocabulary of %d lacks it"
        log.info(text, tokenizer.eos_token, known, model.vocab_size)
        return config, prompts
    eos_token_ids = tuple(dict.fromkeys((*model.eos_token_ids, token_id)))
    model = msgspec.structs.replace(model, eos_token_ids=eos_token_ids)
    return msgspec.structs.replace(config, model=model), prompts


def model_info(config: EngineConfig, prompts: PromptEncoder) -> ModelInfo:
    """Describe the model to clients."""
    return ModelInfo(
        stream=0,
        name=config.name,
        architecture=config.model.architecture,
        dtype=config.dtype,
        device="simulated:fake runner" if config.runner == "fake" else config.device,
        vocab_size=config.model.vocab_size,
        max_model_len=config.scheduler.max_model_len,
        block_tokens=config.cache.block_tokens,
        num_blocks=config.cache.num_blocks,
        eos_token_ids=list(config.model.eos_token_ids),
        has_tokenizer=prompts.tokenizer is not None,
        has_chat_template=prompts.template is not None,
        reasoning_efforts=list(prompts.efforts or ()),
        marks_thinking=prompts.syntax is not None and prompts.syntax.marks_thinking,
        marks_calls=prompts.syntax is not None and prompts.syntax.marks_calls,
        vision=vision_info(config),
    )


def vision_info(config: EngineConfig) -> VisionInfo | None:
    """Describe the images that the model takes; None if it takes none."""
    vision = config.model.vision
    if vision is None:
        return None
    names = ("patch", "merge", "max_side_px", "image_token_id", "break_token_id", "end_token_id")
    return VisionInfo(mean=MEAN, std=STD, **{name: getattr(vision, name) for name in names})

"""`cierzo serve` as a process: signals, exit status, and what is left behind. And its start, in this process."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import uvloop
from byte_words import byte_level
from msgspec.structs import replace

from cierzo.cache.config import CacheConfig
from cierzo.engine import launch
from cierzo.engine.errors import CheckpointError, ConfigError
from cierzo.engine.frontend.client import SyncClient
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.messages import CoreError
from cierzo.engine.worker.fake import fake_config
from cierzo.scheduler.config import SchedulerConfig

DEADLINE_S = 20


def _ends(pid: int) -> bool:
    """Whether a process, which need not be a child of ours, ends in time."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], DEADLINE_S)[0])
    finally:
        os.close(handle)


def test_nothing_is_left_of_a_killed_server_and_the_next_one_takes_its_place(start, tmp_path):
    first, core = start()
    with SyncClient(f"unix:{tmp_path / 'rpc.sock'}") as client:
        next(client.generate(token_ids=[1], max_tokens=100_000, ignore_eos=True))
        first.kill()
        assert _ends(core)
    second, core = start()  # over the socket that the first one left
    assert [path.name for path in tmp_path.iterdir()] == ["rpc.sock"]
    with SyncClient(f"unix:{tmp_path / 'rpc.sock'}") as client:
        next(client.generate(token_ids=[1], max_tokens=100_000, ignore_eos=True))
        second.send_signal(signal.SIGINT)  # in the middle of a stream
        assert second.wait(DEADLINE_S) == 0
    assert _ends(core)
    assert not list(tmp_path.iterdir())


def test_stopped_children_of_a_killed_server_end_too(start):
    server, core = start()
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children")
    while len(pids := [int(pid) for pid in children.read_text(encoding="ascii").split()]) < 3:
        time.sleep(0.01)
    encoders = [pid for pid in pids if pid != core]
    while not all(_is_on_its_way(pid) for pid in encoders):
        time.sleep(0.01)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    server.kill()
    try:
        assert all(_ends(pid) for pid in pids)
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _is_on_its_way(encoder):
    """Whether an encoder has come as far as to its socket."""
    return any(os.readlink(each).startswith("socket:") for each in Path(f"/proc/{encoder}/fd").iterdir())


def test_a_second_server_on_the_address_is_refused_and_the_first_lives_on(start, checkpoint, tmp_path):
    start()
    address = f"unix:{tmp_path / 'rpc.sock'}"
    command = [sys.executable, "-m", "cierzo", "serve", str(checkpoint), "--runner", "fake", "--rpc", address]
    second = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert second.returncode == 2
    (line,) = second.stderr.splitlines()
    assert line.startswith("cierzo: config_error: ")
    assert "another server listens there" in line
    with SyncClient(address) as client:
        assert len(client.complete(token_ids=[1], max_tokens=3, ignore_eos=True).samples[0].token_ids) == 3


def test_a_full_disk_under_the_log_ends_nothing(start, tmp_path):
    with open("/dev/full", "wb") as full:
        server, core = start(stderr=full)
    with SyncClient(f"unix:{tmp_path / 'rpc.sock'}") as client:
        stream = client.generate(token_ids=[1], max_tokens=20_000, ignore_eos=True, seed=1)
        next(stream)
        os.kill(core, signal.SIGKILL)  # which is logged
        assert sum(len(delta.token_ids) for delta in stream) > 10_000
        assert client.stats().core_restarts == 1
    server.send_signal(signal.SIGTERM)
    assert server.wait(DEADLINE_S) == 0


CONFIG = fake_config(SchedulerConfig(max_model_len=64), CacheConfig(num_blocks=8, hash_key="00" * 16))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_while_the_core_loads(cores, tmp_path, number, status):
    cores.silent = True  # never ready

    async def spawn(path):
        core = await cores(path)
        os.kill(os.getpid(), number)
        return core

    frontend = FrontendConfig(address=f"unix:{tmp_path / 'rpc.sock'}")
    assert uvloop.run(launch._serve(replace(CONFIG, frontend=frontend), spawn)) == status
    assert cores.now.exited.done()
    assert not list(tmp_path.iterdir())


def test_what_is_on_is_told_at_the_start_and_no_hangup_is_lost(cores, tmp_path, monkeypatch, capsys):
    """SIGHUP while the tokenizer is read: `python -m cierzo serve` has ignored it up to there."""
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    reloads, load = [], launch.load_prompts
    monkeypatch.setattr(launch.RpcServer, "reload", lambda server: reloads.append(server.door.tenants))

    def hung_up(config):
        os.kill(os.getpid(), signal.SIGHUP)
        return load(config)

    async def spawn(path):
        os.kill(os.getpid(), signal.SIGTERM)
        return await cores(path)

    monkeypatch.setattr(launch, "load_prompts", hung_up)
    cores.silent = True
    keys, usage = tmp_path / "keys", tmp_path / "usage"
    keys.touch(mode=0o600)
    keys.write_text('{"tenant": "ann"}\n{"tenant": "default"}')
    frontend = FrontendConfig(
        address=f"unix:{tmp_path / 'sock'}", keys=str(keys), usage_file=str(usage), metrics="127.0.0.1:0"
    )
    try:
        assert uvloop.run(launch._serve(replace(CONFIG, frontend=frontend), spawn)) == 0
    finally:
        signal.signal(signal.SIGHUP, ignored)
    assert [sorted(tenants) for tenants in reloads] == [["ann", "default"]]
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[-3:])
    assert told["keys"] == f"{keys} (tenants: 2)"
    assert told["usage"].split() == ["file", str(usage)]
    host, _, port = told["metrics"].partition(":")
    assert (host, int(port) > 0) == ("127.0.0.1", True)


def test_what_is_not_set_has_no_line():
    assert launch.describe_door(FrontendConfig(), 1, "") == ""
    with_tls = FrontendConfig(tls_certificate="c.pem", tls_key="k.pem", tls_client_ca="ca.pem")
    told = launch.describe_door(with_tls, 1, "")
    assert told == "\nTLS            c.pem, clients show one that ca.pem vouches for"


def test_the_core_ends_at_the_tokenizers_eos_token(cores, tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    cores.error = CoreError(code="checkpoint_error", message="it has been told enough")
    config = replace(CONFIG, checkpoint=str(tmp_path), frontend=FrontendConfig(address=f"unix:{tmp_path / 'sock'}"))
    with pytest.raises(CheckpointError, match="told enough"):
        uvloop.run(launch._serve(config, cores))
    told = msgspec.msgpack.decode(cores.now.hello)
    assert told["model"]["eos_token_ids"] == [257]


def test_open_files_follow_the_connections(monkeypatch):
    limits, was = [], (100, 5000)
    monkeypatch.setattr(resource, "getrlimit", lambda which: was)
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: limits.append(pair))
    launch._allow_files(90)
    launch._allow_files(1024)
    assert limits == [(1024, 5000)]
    with pytest.raises(ConfigError, match="the system allows 5000") as caught:
        launch._allow_files(5001)
    assert (caught.value.field, caught.value.limit) == ("max_connections", f"at most {5000 - launch.SPARE_FILES}")
    assert caught.value.value == str(5001 - launch.SPARE_FILES)

"""Metrics and probes: their numbers are the front end's, their labels are bounded, their page is cheap to make."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from functools import wraps
from itertools import pairwise

import msgspec
import pytest
import uvloop
from observe_cost import CORE_STATS, front_end, opened, page_s, step
from prometheus_client.parser import text_string_to_metric_families
from streams import all_of, final_of, until

from cierzo.engine.errors import CierzoError, ConfigError, Draining
from cierzo.engine.frontend.client import Client
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.observe.observer import MAX_TENANTS, OTHERS
from cierzo.engine.frontend.observe.tallies import BOUNDS_S, Histogram
from cierzo.engine.frontend.observe.web import MAX_CONNECTIONS, TIMEOUT_S, MetricsServer
from cierzo.engine.messages import FEATURES, Finish, GetHealth, Health, Hello, StepOutput

VLLM = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:prefix_cache_queries": "counter",
    "vllm:prefix_cache_hits": "counter",
    "vllm:prompt_tokens": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:request_success": "counter",
    "vllm:num_preemptions": "counter",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
}


def on_a_loop(test):
    """Run a test within a loop, which timers need."""

    @wraps(test)
    def looped():
        async def body():
            test()

        uvloop.run(body())

    return looped


class Page:
    """A page of metrics, read as Prometheus reads it."""

    def __init__(self, frontend):
        server = MetricsServer(FrontendConfig(), frontend)
        self.families = {each.name: each for each in text_string_to_metric_families(server.metrics().decode())}
        self.samples = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for each in self.families.values()
            for sample in each.samples
        }

    def __call__(self, name, **labels):
        return self.samples[(name, *sorted(labels.items()))]


@on_a_loop
def test_names_of_vllm_have_its_kinds_and_label():
    frontend = front_end()
    frontend.core.step(StepOutput(deltas=[], stats=CORE_STATS))
    page = Page(frontend)
    found = {name: each.type for name, each in page.families.items() if name.startswith("vllm:")}
    assert found == VLLM
    assert all(sample.labels["model_name"] == "fake" for name in VLLM for sample in page.families[name].samples)
    assert all(name.startswith(("cierzo_", "vllm:")) for name in page.families)
    told = {
        name.removeprefix("vllm:"): page(name, model_name="fake")
        for name in (
            f"{name}{'_total' * (kind == 'counter')}" for name, kind in VLLM.items() if kind != "histogram"
        )
        if name != "vllm:request_success_total"
    }
    assert told == {
        "num_requests_running": 3,
        "num_requests_waiting": 2,
        "kv_cache_usage_perc": 0.4,
        "prefix_cache_queries_total": 100,
        "prefix_cache_hits_total": 40,
        "prompt_tokens_total": 100,
        "generation_tokens_total": 30,
        "num_preemptions_total": 5,
    }
    assert [page("cierzo_kv_blocks", state=state) for state in ("blank", "cached", "used")] == [2, 4, 4]


@on_a_loop
def test_counters_of_a_core_that_died_are_kept():
    frontend = front_end()
    for _ in range(3):
        frontend.core.step(StepOutput(deltas=[], stats=CORE_STATS))
        frontend.core._recovery.died()  # so that nothing of a search is asked of the core that is not there
        frontend.core.lost(committed=True)
        frontend.core.ready()
    frontend.core.step(StepOutput(deltas=[], stats=CORE_STATS))
    page = Page(frontend)
    assert page("cierzo_generation_tokens_total") == 4 * 30
    assert page("cierzo_core_restarts_total") == 3
    assert page("cierzo_sequences_running") == 3, "a gauge is of the core that runs"


def test_requests_are_counted_by_how_they_ended(serving, cores, run):
    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            await all_of(client.generate(token_ids=[1, 2], max_tokens=3, ignore_eos=True))
            await all_of(
                client.generate(token_ids=[1, 2], max_tokens=4, ignore_eos=True, seed=0, stop_token_ids=[10])
            )
            stuck = client.generate(token_ids=[1, 2, 3], max_tokens=4000, ignore_eos=True)
            await stuck.accepted()
            page = Page(house.frontend)
            assert page("cierzo_open_requests", tenant="default") == 1
            assert page("cierzo_connections") == 1
            stuck.cancel()
            await final_of(stuck)
            with pytest.raises(CierzoError):
                await final_of(client.generate(token_ids=[999_999]))
            house.frontend.drain()
            with pytest.raises(Draining):
                await final_of(client.generate(token_ids=[1]))
            page = Page(house.frontend)
        ends = {"length": 1, "stop": 1, "cancelled": 1, "invalid_request": 1, "draining": 1}
        for end, count in ends.items():
            assert page("cierzo_requests_total", tenant="default", end=end) == count
        assert page("cierzo_refused_total", code="invalid_request", limit="", whose="server") == 1
        assert page("cierzo_refused_total", code="draining", limit="", whose="server") == 1
        assert page("cierzo_accepted_total") == 3
        for reason, count in {"stop": 1, "length": 1, "abort": 1, "error": 0}.items():
            assert page("vllm:request_success_total", model_name="fake", finished_reason=reason) == count
        assert page("cierzo_tenant_prompt_tokens_total", tenant="default") == 7
        assert page("cierzo_state", state="draining") == 1
        assert page("cierzo_state", state="ready") == 0
        assert page("cierzo_time_to_first_token_seconds_count", tenant="default") >= 2

    run(body())


@on_a_loop
def test_errors_that_end_requests_are_vllms_errors_and_no_refusals():
    frontend = front_end()
    opened(frontend, 3)
    frontend.interrupt()
    frontend.core.settle()
    page = Page(frontend)
    assert page("vllm:request_success_total", model_name="fake", finished_reason="error") == 3
    assert not [name for name, *_ in page.samples if name == "cierzo_refused_total"]


@on_a_loop
def test_accounts_are_told_by_tenant():
    frontend = front_end()
    streams = opened(frontend, 4, tenants=2)
    step(frontend, streams, Finish("length", "", None, 3, 16, 1, 2, 0.1, 0.2, 0.3, 19, 4, 16, 1.5))
    page = Page(frontend)
    sums = {
        "prompt_tokens_total": 6,
        "cached_tokens_total": 2,
        "output_tokens_total": 2,
        "computed_tokens_total": 38,
        "recomputed_tokens_total": 8,
        "sequence_steps_total": 32,
        "preemptions_total": 4,
        "kv_block_seconds_total": 3.0,
    }
    for tenant in ("tenant-0", "tenant-1"):
        assert {name: page(f"cierzo_tenant_{name}", tenant=tenant) for name in sums} == sums


@on_a_loop
def test_the_label_of_tenants_is_bounded():
    frontend = front_end()
    frontend.observer.expect(["from-the-key-file"])
    opened(frontend, 100, tenants=100)
    frontend.interrupt()
    frontend.core.settle()
    page = Page(frontend)
    for name in ("cierzo_requests_total", "cierzo_open_requests", "cierzo_time_to_first_token_seconds_count"):
        tenants = {dict(labels)["tenant"] for found, *labels in page.samples if found == name}
        assert len(tenants) <= MAX_TENANTS
        assert "from-the-key-file" in tenants or name == "cierzo_requests_total"
    assert page("cierzo_requests_total", tenant=OTHERS, end="interrupted") == 100 - (MAX_TENANTS - 1 - 2)


# --- latencies ---------------------------------------------------------------------------------------------


def test_buckets_begin_at_a_millisecond_and_hold_what_is_at_most_their_bound():
    assert BOUNDS_S[0] == 0.001
    assert all(low < high for low, high in pairwise(BOUNDS_S))
    histogram = Histogram()
    for seconds in (0.0, 0.001, 0.0011, 1e9):
        histogram.add(seconds)
    assert (histogram.counts[0], histogram.counts[1], histogram.counts[-1]) == (2, 1, 1)


@on_a_loop
def test_gaps_between_tokens_are_those_of_each_sample():
    """Shared ones are counted together, those of samples that missed steps by themselves."""
    clock = [100.0]
    frontend = front_end(clock=lambda: clock[0])
    first, second, late = opened(frontend, 3)
    clock[0] += 2.0
    step(frontend, [first, second])  # first tokens
    for seconds, streams in ((0.5, [first, second]), (0.25, [first]), (0.0, []), (0.25, [first, second, late])):
        clock[0] += seconds
        step(frontend, streams)
    page = Page(frontend)
    gaps = [0.5, 0.5, 0.25, 0.25, 0.5]
    assert page("cierzo_inter_token_latency_seconds_count") == len(gaps)
    assert page("cierzo_inter_token_latency_seconds_sum") == pytest.approx(sum(gaps))
    assert page("cierzo_inter_token_latency_seconds_bucket", le="0.2") == 0
    assert page("cierzo_inter_token_latency_seconds_bucket", le="0.5") == len(gaps)
    firsts_s = page("vllm:time_to_first_token_seconds_sum", model_name="fake")
    assert firsts_s == pytest.approx(2.0 + 2.0 + 3.0)
    assert Page(frontend)("cierzo_inter_token_latency_seconds_count") == len(gaps), "counted once"


@on_a_loop
def test_a_pause_for_a_slow_reader_is_no_gap():
    clock = [100.0]
    frontend = front_end(clock=lambda: clock[0])
    (stream,) = opened(frontend, 1)
    step(frontend, [stream])
    frontend.core.withdraw(stream)
    clock[0] += 60.0
    frontend.core.submit(stream)
    for _ in range(2):
        clock[0] += 0.5
        step(frontend, [stream])
    page = Page(frontend)
    assert page("cierzo_inter_token_latency_seconds_count") == 1
    assert page("cierzo_inter_token_latency_seconds_sum") == pytest.approx(0.5)


# --- what hangs on others ----------------------------------------------------------------------------------


def test_certificate_and_lost_lines_are_asked_for():
    frontend = front_end()
    assert "cierzo_certificate_expiry_timestamp_seconds" not in Page(frontend).families
    frontend.observer.certificate_expires_s = lambda: 1.8e9
    frontend.observer.num_lost_lines = lambda: 7
    page = Page(frontend)
    assert page("cierzo_certificate_expiry_timestamp_seconds") == 1.8e9
    assert page("cierzo_log_lines_lost_total") == 7


def test_usage_records_are_counted(tmp_path, run):
    async def body():
        frontend = front_end(usage_file=str(tmp_path / "usage.jsonl"))
        opened(frontend, 3)
        frontend.interrupt()
        frontend.core.settle()
        await until(lambda: frontend.observer.usage.num_written == 3)
        page = Page(frontend)
        await frontend.close()
        assert page("cierzo_usage_records_total") == 3
        assert page("cierzo_usage_records_lost_total") == page("cierzo_usage_failing") == 0

    run(body())


# --- time --------------------------------------------------------------------------------------------------


@on_a_loop
def test_a_page_is_made_in_under_10_ms_at_1024_streams():
    assert min(page_s(1024, 1) for _ in range(3)) < 0.010
    assert min(page_s(1024, MAX_TENANTS) for _ in range(3)) < 0.030  # a third of it on an idle machine


def test_scrapes_take_a_tenth_of_the_loop_at_most():
    now = [0.0]

    def clock():
        now[0] += 1.0  # between two readings
        return now[0]

    server = MetricsServer(FrontendConfig(), front_end(), clock)
    first = server.metrics()  # from 1 to 2: told again until 12
    while now[0] < 11:
        assert server.metrics() is first
    assert server.metrics() is not first


# --- probes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "been_ready", "draining", "answers"),
    [
        ("loading", False, False, (False, True, False)),
        ("ready", True, False, (True, True, True)),
        ("loading", True, False, (True, True, False)),
        ("stalled", True, False, (True, True, False)),
        ("ready", True, True, (True, True, False)),
        ("failed", True, False, (True, False, False)),
        ("failed", True, True, (True, False, False)),
    ],
)
def test_three_questions_have_three_answers(serving, peering, run, state, been_ready, draining, answers):
    async def body():
        async with serving() as house:
            frontend = house.frontend
            frontend.notes += [lambda: "the certificate expires in 3 days", lambda: None]
            frontend.core.state, frontend.core.has_been_ready = state, been_ready
            if draining:
                frontend.drain()
            probes = frontend.probes
            assert (probes.startup, probes.live, probes.ready) == answers
            for features, told in ((FEATURES, answers), (("resume",), (False, False, False))):
                async with peering(house, Hello(features=[*features])) as peer:
                    peer.say(GetHealth(stream=1))
                    health = await peer.hear_until(Health)
                    assert (health.startup, health.live, health.ready) == told
                    assert health.notes == (["the certificate expires in 3 days"] if told is answers else [])
            server = MetricsServer(FrontendConfig(metrics="127.0.0.1:0"), frontend)
            await server.start()
            for path, is_well in zip(("startup", "live", "ready"), answers, strict=True):
                status, body = await fetched(server, f"/health/{path}")
                assert status == (200 if is_well else 503)
                assert msgspec.json.decode(body)[path] is is_well
            await server.close()

    run(body())


def test_older_versions_see_nothing_new(serving, peering, run):
    async def body():
        async with serving() as house, peering(house, Hello(version=2, features=[*FEATURES])) as peer:
            peer.say(GetHealth(stream=1))
            size = int.from_bytes(await peer.reader.readexactly(4), "big")
            fields = msgspec.msgpack.decode(await peer.reader.readexactly(size))
            assert set(fields) == {"type", "stream", "state", "uptime_s"}

    run(body())


# --- HTTP --------------------------------------------------------------------------------------------------


async def fetched(server, path, request=None):
    """(status, body) of a request."""
    where = server.address
    opening = (
        asyncio.open_unix_connection(where.removeprefix("unix:"))
        if where.startswith("unix:")
        else asyncio.open_connection(*where.split(":"))
    )
    reader, writer = await opening
    writer.write(request or f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head:
        return None, b""
    length = int(re.search(rb"Content-Length: (\d+)", head)[1])
    assert len(body) in (length, 0)
    return int(head.split(b" ")[1]), body


@pytest.mark.parametrize("address", ["127.0.0.1:0", "unix:PATH"])
def test_a_page_over_http(run, tmp_path, address):
    async def body():
        address_here = address.replace("PATH", str(tmp_path / "metrics.sock"))
        for _ in range(2):  # a socket file that is left is no hindrance, and none is left
            server = MetricsServer(FrontendConfig(metrics=address_here), front_end())
            await server.start()
            status, body = await fetched(server, "/metrics")
            assert status == 200
            assert b"cierzo_server_info" in body
            await server.close()
            assert not list(tmp_path.iterdir())

    run(body())


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", 200),
        (b"GET /metrics?name=x HTTP/1.0\r\n\r\n", 200),
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /health HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\n\r\n", 405),
        (b"GET /metrics\r\n\r\n", 400),
        (b"\x00\xff\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 5000 + b"\r\n", 431),
    ],
)
def test_whatever_is_asked_has_an_answer(run, request_bytes, status):
    async def body():
        server = MetricsServer(FrontendConfig(metrics="127.0.0.1:0"), front_end())
        await server.start()
        found, answer = await fetched(server, "", request_bytes)
        assert found == status
        assert bool(answer) == (not request_bytes.startswith(b"HEAD"))
        await server.close()

    run(body())


async def probed(server):
    """A connection that has an answer, and stays open."""
    reader, writer = await asyncio.open_connection(*server.address.split(":"))
    writer.write(b"GET /health/live HTTP/1.1\r\n\r\n")
    assert (await reader.readuntil(b"\r\n")).endswith(b"200 OK\r\n")
    return reader, writer


def test_a_probe_is_answered_beside_as_many_connections_as_there_may_be(run):
    """The oldest one goes that has sent no head, or the oldest where all have."""

    async def body():
        server = MetricsServer(FrontendConfig(metrics="127.0.0.1:0"), front_end())
        await server.start()
        open_now = [await probed(server)]
        (first,) = server._answering
        for _ in range(MAX_CONNECTIONS - 1):
            open_now.append(await asyncio.open_connection(*server.address.split(":")))
        await until(lambda: len(server._answering) == MAX_CONNECTIONS)
        began = asyncio.get_running_loop().time()
        kept = []
        for _ in range(MAX_CONNECTIONS):
            open_now.append(await probed(server))
            kept.append((first in server._answering, len(server._answering)))
        waited_s = asyncio.get_running_loop().time() - began
        await server.close()
        for reader, writer in open_now:
            with suppress(ConnectionResetError):
                await reader.read()
            writer.close()
        assert kept == [(True, MAX_CONNECTIONS)] * (MAX_CONNECTIONS - 1) + [(False, MAX_CONNECTIONS)]
        assert waited_s < TIMEOUT_S / 2, "at once, and not when a time is over"

    run(body())


def test_beyond_this_machine_it_takes_a_word(run):
    async def body():
        with pytest.raises(ConfigError, match="insecure") as caught:
            await MetricsServer(FrontendConfig(metrics="0.0.0.0:0"), front_end()).start()
        assert caught.value.field == "metrics"
        server = MetricsServer(FrontendConfig(metrics="0.0.0.0:0", insecure=True), front_end())
        await server.start()
        assert (await fetched(server, "/health/live"))[0] == 200
        taken = MetricsServer(FrontendConfig(metrics=server.address.replace("0.0.0.0", "127.0.0.1")), front_end())
        with pytest.raises(ConfigError, match="metrics cannot listen"):
            await taken.start()
        await server.close()

    run(body())


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:99999", "unix:"])
def test_an_address_that_is_none_is_refused_by_its_name(run, address):
    async def body():
        with pytest.raises(ConfigError) as caught:
            await MetricsServer(FrontendConfig(metrics=address), front_end()).start()
        assert caught.value.field == "metrics"

    run(body())

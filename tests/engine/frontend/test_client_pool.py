"""A client of several servers: where requests go, what is repeated elsewhere, and what errors say of it."""

from __future__ import annotations

import asyncio

import pytest
from fake_rpc_server import accepted, delta, final, scripted

from cierzo.cli import main
from cierzo.engine.errors import (
    ConfigError,
    ConnectionLost,
    DeadlineUnreachable,
    Draining,
    Interrupted,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unauthorized,
)
from cierzo.engine.frontend.client import Client, Reconnect, Retry
from cierzo.engine.frontend.frames import pack
from cierzo.engine.frontend.retries import Budget
from cierzo.engine.messages import CancelRequest, Done, Drain, Failure, Generate, GetHealth, Health, Resume

AT_ONCE = Reconnect(first_pause_s=0.0, longest_pause_s=0.0)
SOON = Retry(first_pause_s=0.0, longest_pause_s=0.0)


class Server:
    """A script that refuses with `refusals`, in order, then answers with `text`; it remembers what it heard."""

    def __init__(self, text="ok", refusals=(), state="ready", holds=False):
        self.text = text
        self.refusals = [*refusals]
        self.state = state
        self.holds = holds
        self.heard = []

    async def __call__(self, peer, number):
        while (message := await peer.hear((Generate, Resume, GetHealth, CancelRequest, Drain))) is not None:
            self.heard.append(message)
            if isinstance(message, GetHealth):
                peer.say(Health(stream=message.stream, state=self.state, uptime_s=1.0))
            elif isinstance(message, Drain):
                peer.say(Done(stream=message.stream))
            elif isinstance(message, CancelRequest) or self.refusals:
                refusal = self.refusals.pop(0) if self.refusals else {"code": "not_found"}
                peer.say(Failure(**{"stream": message.stream, "message": "no"} | refusal))
            else:
                peer.say(accepted(message.stream))
                if not self.holds:
                    tokens = [*map(ord, self.text)][len(getattr(message, "output_token_ids", ())) :]
                    peer.say(delta(message.stream, tokens), final(message.stream, len(self.text)))

    @property
    def requests(self):
        return [message for message in self.heard if isinstance(message, Generate)]


async def text_of(generation):
    return "".join([part.text async for part in generation])


def test_requests_go_to_the_connection_with_the_fewest(run):
    async def body():
        one, two = Server(holds=True), Server(holds=True)
        async with (
            scripted(one) as first,
            scripted(two) as second,
            await Client.connect([first, second], connections=2) as client,
        ):
            generations = [client.generate(token_ids=[number]) for number in range(8)]
            for generation in generations:
                await generation.accepted()
            links = [link for endpoint in client._session.endpoints for link in endpoint.links]
            assert [link.num_open for link in links] == [2, 2, 2, 2]
            assert (len(one.requests), len(two.requests)) == (4, 4)

    run(body())


def test_an_address_that_is_not_there_is_done_without(run):
    async def body():
        server = Server()
        async with scripted(server) as gone:
            pass
        async with scripted(server) as address, await Client.connect([gone, address]) as client:
            assert await text_of(client.generate(token_ids=[1])) == "ok"
            with pytest.raises(ConfigError, match="address must be one of this client's"):
                await client.health("127.0.0.1:1")
        with pytest.raises(ConnectionLost, match="no server answers"):
            await Client.connect([gone, address])

    run(body())


@pytest.mark.parametrize("code", ["overloaded", "draining", "core_stalled", "core_failed"])
def test_what_one_server_refuses_another_gets_with_the_same_key(run, code):
    async def body():
        busy, free = Server(refusals=[{"code": code}] * 9), Server()
        async with (
            scripted(busy) as first,
            scripted(free) as second,
            await Client.connect([first, second]) as client,
        ):
            generation = client.generate(token_ids=[1])
            assert await text_of(generation) == "ok"
            (refused,), (taken,) = busy.requests, free.requests
            assert refused.idempotency_key == taken.idempotency_key
            await text_of(client.generate(token_ids=[2]))
            assert len(busy.requests) == (2 if code == "overloaded" else 1)  # the others leave it alone for a while
            assert len(free.requests) == 2

    run(body())


def test_one_server_is_asked_again_after_the_time_it_asks_for(run):
    async def body():
        server = Server(refusals=[{"code": "overloaded", "retry_after_s": 0.2}])
        async with scripted(server) as address, await Client.connect(address, retry=SOON) as client:
            began_s = asyncio.get_running_loop().time()
            assert await text_of(client.generate(token_ids=[1], deadline_s=9.0)) == "ok"
            assert asyncio.get_running_loop().time() - began_s >= 0.19  # the loop counts in milliseconds
            first, second = server.requests
            assert second.deadline_s < first.deadline_s - 0.19  # what is left of it

    run(body())


@pytest.mark.parametrize(
    ("refusal", "policy", "deadline_s", "attempts"),
    [
        ({"code": "overloaded"}, SOON, None, 3),
        ({"code": "overloaded"}, False, None, 1),
        ({"code": "overloaded"}, None, None, 1),  # one address: not unless it is asked for
        ({"code": "overloaded", "retry_after_s": 5.0}, SOON, 1.0, 1),
        ({"code": "overloaded", "retry_after_s": 50.0}, SOON, None, 1),
        ({"code": "overloaded"}, Retry(first_pause_s=0.0, burst=0.5), None, 1),
        ({"code": "overloaded", "field": "max_kept_bytes"}, SOON, None, 3),
        ({"code": "deadline_unreachable"}, SOON, None, 1),
        ({"code": "invalid_request"}, SOON, None, 1),
        ({"code": "unauthorized"}, SOON, None, 1),
        ({"code": "forbidden"}, SOON, None, 1),
    ],
)
def test_repetition_has_bounds_and_the_error_says_that_it_did_not_run(run, refusal, policy, deadline_s, attempts):
    async def body():
        server = Server(refusals=[refusal] * 9)
        async with scripted(server) as address, await Client.connect(address, retry=policy) as client:
            with pytest.raises(Exception, match="no") as caught:
                await anext(client.generate(token_ids=[1], deadline_s=deadline_s))
            assert caught.value.code == refusal["code"]
            assert caught.value.may_have_run is False
            assert len(server.requests) == attempts

    run(body())


def test_a_tenth_of_the_requests_may_be_repeated():
    budget = Budget(Retry(burst=2.0))
    assert [budget.spend() for _ in range(3)] == [True, True, False]
    repeated = 0
    for _ in range(1000):
        budget.earn()
        repeated += budget.spend()
    assert 98 <= repeated <= 100


def test_a_request_that_waits_for_its_next_attempt_can_be_cancelled_and_the_client_closed(run):
    async def body():
        server = Server(refusals=[{"code": "overloaded", "retry_after_s": 20.0}] * 2)
        async with scripted(server) as address, await Client.connect(address, retry=SOON) as client:
            cancelled, closed = client.generate(token_ids=[1]), client.generate(token_ids=[2])
            while len(client._session._pausing) < 2:
                await asyncio.sleep(0.001)
            cancelled.cancel()
            with pytest.raises(Overloaded):
                await anext(cancelled)
            await client.close()
            with pytest.raises(ConnectionLost, match="closed"):
                await anext(closed)

    run(body())


@pytest.mark.parametrize("retry", [SOON, False])
def test_an_interrupted_answer_goes_on_elsewhere(run, retry):
    async def stops(peer, number):
        request = await peer.hear(Generate)
        peer.say(accepted(request.stream), delta(request.stream, [65, 66]))
        peer.say(Failure(stream=request.stream, code="interrupted", message="stops", value="7"))
        await peer.hear(Generate)

    async def body():
        other = Server("@ABCD")
        async with (
            scripted(stops) as first,
            scripted(other) as second,
            await Client.connect([first, second], retry=retry) as client,
        ):
            generation = client.generate(token_ids=[1], output_token_ids=[64])
            assert await text_of(generation) == "ABCD"
            (again,) = other.requests
            assert (again.output_token_ids, again.sampling.seed) == ([64, 65, 66], 7)

    run(body())


def test_an_interrupted_answer_that_cannot_go_on_says_that_it_ran(run):
    async def stops(peer, number):
        while (request := await peer.hear(Generate)) is not None:
            peer.say(accepted(request.stream), delta(request.stream, [65]))
            peer.say(Failure(stream=request.stream, code="interrupted", message="stops", value="7"))

    async def body():
        other = Server()
        async with scripted(stops) as first, await Client.connect(first, retry=SOON) as client:
            with pytest.raises(Interrupted) as caught:
                await text_of(client.generate(token_ids=[1]))
            assert caught.value.may_have_run
        async with (
            scripted(stops) as first,
            scripted(other) as second,
            await Client.connect([first, second]) as client,
        ):
            with pytest.raises(Interrupted):  # two samples have no common offset
                await text_of(client.generate(token_ids=[1], n=2))
            assert not other.requests

    run(body())


def test_what_may_have_run_is_not_sent_elsewhere(run):
    """A connection is lost before the server says that it accepts: only the same server may be asked again."""

    async def loses(peer, number):
        keys.append((await peer.hear(Generate)).idempotency_key)
        if number == 0:
            peer.drop()
        else:
            peer.say(Failure(stream=1, code="overloaded", message="still loading"))
            await peer.hear()

    async def body():
        other = Server()
        async with (
            scripted(loses) as first,
            scripted(other) as second,
            await Client.connect([first, second], reconnect=AT_ONCE) as client,
        ):
            with pytest.raises(Overloaded) as caught:
                await anext(client.generate(token_ids=[1]))
            assert caught.value.may_have_run
            assert keys[0] == keys[1]
            assert not other.requests

    keys = []
    run(body())


def test_a_lost_connection_goes_on_on_another_one_to_the_same_address(run):
    async def script(peer, number):
        if (message := await peer.hear((Generate, Resume))) is None:
            return
        if isinstance(message, Generate):
            peer.say(accepted(message.stream), delta(message.stream, [65]))
            await lost.wait()
            peer.drop()
        else:
            assert message.received == [1]
            peer.say(accepted(message.stream), delta(message.stream, [66]), final(message.stream))
            await peer.hear()

    async def body():
        slow = Reconnect(first_pause_s=100.0, longest_pause_s=100.0, within_s=1000.0)
        async with (
            scripted(script) as address,
            await Client.connect(address, connections=2, reconnect=slow) as client,
        ):
            generation = client.generate(token_ids=[1])
            assert (await anext(generation)).text == "A"
            lost.set()
            assert await text_of(generation) == "B"

    lost = asyncio.Event()
    run(body())


def test_a_server_without_room_for_keys_is_asked_without_one(run):
    async def body():
        server = Server(refusals=[{"code": "overloaded", "field": "max_idempotency_keys"}])
        async with scripted(server) as address, await Client.connect(address) as client:
            for _ in range(2):
                assert await text_of(client.generate(token_ids=[1])) == "ok"
            assert [bool(request.idempotency_key) for request in server.requests] == [True, False, False]

    run(body())


def test_ids_are_looked_for_at_every_address(run):
    async def body():
        one, two = Server(refusals=[{"code": "not_found"}]), Server("rest")
        async with (
            scripted(one) as first,
            scripted(two) as second,
            await Client.connect([first, second]) as client,
        ):
            assert await text_of(client.resume("ab" * 16, [0])) == "rest"
            with pytest.raises(NotFound):
                await client.cancel_request("cd" * 16)
            assert sum(isinstance(message, CancelRequest) for message in one.heard + two.heard) == 2
            with pytest.raises(InvalidRequest, match="which server is to drain"):
                await client.drain()
            await client.drain(second)
            assert isinstance(two.heard[-1], Drain)

    run(body())


def test_ready_is_who_has_one_ready_server(run):
    async def body():
        one, two = Server(state="draining"), Server(state="loading")
        async with (
            scripted(one) as first,
            scripted(two) as second,
            await Client.connect([first, second]) as client,
        ):
            with pytest.raises(TimeoutError, match="its state is draining, loading"):
                await client.wait_ready(timeout_s=0.1)
            two.state = "ready"
            await client.wait_ready(timeout_s=5.0)
            two.state = "draining"
            with pytest.raises(Draining):
                await client.wait_ready()

    run(body())


def test_nobody_waits_for_servers_that_all_refuse_the_key(run):
    """They let this client in once: keys are taken back while they run."""

    async def body():
        one, two = Server(), Server()
        async with (
            scripted(one) as first,
            scripted(two) as second,
            await Client.connect([first, second], key="k") as client,
        ):
            await client.wait_ready(timeout_s=5.0)
            for endpoint in client._session.endpoints:
                for link in endpoint.links:
                    link.close(Unauthorized("this server wants a key that it knows"))
            while any(endpoint.links for endpoint in client._session.endpoints):
                await asyncio.sleep(0)
            with pytest.raises(Unauthorized):
                await client.wait_ready(timeout_s=60.0)

    run(body())


def test_a_deadline_holds_while_there_is_no_connection(run):
    async def script(peer, number):
        if number == 0:
            await peer.hear(Generate)
            peer.drop()

    async def body():
        slow = Reconnect(first_pause_s=100.0, longest_pause_s=100.0, within_s=1000.0)
        async with (
            scripted(script) as address,
            await Client.connect(address, reconnect=slow, default_deadline_s=0.1) as client,
        ):
            first = client.generate(token_ids=[1])
            await client._session.link.closed
            waits = client.generate(token_ids=[2])
            for generation, ran in ((first, True), (waits, False)):
                with pytest.raises(ConnectionLost, match="deadline passed") as caught:
                    await anext(generation)
                assert caught.value.may_have_run is ran

    run(body())


def test_what_is_refused_before_it_is_sent_did_not_run(run):
    async def body():
        async with scripted(Server()) as address, await Client.connect(address) as client:
            for wrong in ({"token_ids": [1], "n": 99}, {"token_ids": [1], "unknown": 1}):
                with pytest.raises(InvalidRequest) as caught:
                    client.generate(**wrong)
                assert caught.value.may_have_run is False

    run(body())


def test_a_trace_is_sent_to_servers_that_take_it(run):
    async def body():
        for features in (("resume", "trace"), ("resume",)):
            server = Server()
            async with scripted(server, features=features) as address, await Client.connect(address) as client:
                await text_of(client.generate(token_ids=[1], caller_id="mine", traceparent="00-ab-cd-01"))
                (request,) = server.requests
                told = ("mine", "00-ab-cd-01") if "trace" in features else ("", "")
                assert (request.caller_id, request.traceparent) == told

    run(body())


def test_a_key_is_sent_and_never_shown(run):
    heard = []

    async def script(peer, number):
        heard.append(peer.hello.key)
        await peer.hear()

    async def body():
        async with scripted(script) as address, await Client.connect(address, key="s3cret") as client:
            assert client.welcome.server == "scripted"
        assert heard == ["s3cret"]
        with pytest.raises(ConfigError) as caught:
            await Client.connect(address, key="s3cret\n")
        assert "s3cret" not in str(caught.value)

    run(body())


def test_a_wrong_key_is_told_at_once(run):
    async def refuses(reader, writer):
        await reader.read(100)
        writer.write(bytes(pack([Failure(stream=-1, code="unauthorized", message="no")])))
        writer.close()

    async def body():
        async with await asyncio.start_server(refuses, "127.0.0.1", 0) as server, scripted(Server()) as good:
            address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            for addresses in (address, [good, address]):
                with pytest.raises(Unauthorized):
                    await Client.connect(addresses, key="wrong")

    run(body())


def test_a_deadline_that_could_be_met_later_is_asked_for_elsewhere(run):
    async def body():
        busy, free = Server(refusals=[{"code": "deadline_unreachable", "retry_after_s": 50.0}]), Server()
        async with (
            scripted(busy) as first,
            scripted(free) as second,
            await Client.connect([first, second]) as client,
        ):
            assert await text_of(client.generate(token_ids=[1], deadline_s=1.0)) == "ok"
        async with scripted(busy) as first, await Client.connect(first, retry=SOON) as client:
            busy.refusals = [{"code": "deadline_unreachable", "retry_after_s": 50.0}]
            with pytest.raises(DeadlineUnreachable):
                await anext(client.generate(token_ids=[1], deadline_s=1.0))

    run(body())


def test_the_command_line_takes_the_file_of_a_key(scripting, tmp_path, capsys):
    heard = []

    async def script(peer, number):
        heard.append(peer.hello.key)
        while (message := await peer.hear((GetHealth, Generate))) is not None:
            if isinstance(message, GetHealth):
                peer.say(Health(stream=message.stream, state="ready", uptime_s=1.0))
            else:
                peer.say(accepted(message.stream), delta(message.stream, [65]), final(message.stream, 1))

    path, server = tmp_path / "key", scripting(script)
    path.write_text("s3cret\n")
    assert main(["chat", "--rpc", server.address, "--message", "Hi", "--key-file", str(path)]) == 0
    assert heard == ["s3cret"]
    assert main(["chat", "--rpc", server.address, "--message", "Hi", "--key-file", f"{path}x"]) == 2
    told = capsys.readouterr()
    assert "key_file must be a file that holds a key" in told.err
    assert "s3cret" not in told.out + told.err

"""A fake server for tests of programs that use cierzo: the real protocol, without a model.

    from cierzo.engine.frontend.client import SyncClient
    from cierzo.testing import FakeServer

    def test_the_answer_is_shown():
        with FakeServer(answers={"Hi": "Hello."}) as server, SyncClient(server.address) as client:
            assert client.ask(text="Hi").text == "Hello."
            assert [message.text for message in server.requests] == ["Hi"]

It starts in a fraction of a second, in a thread of its own, and needs neither torch nor a checkpoint. Faults come
when they are asked for:

    server.refuse(Overloaded, times=2, retry_after_s=0.1)  # any error of cierzo.engine.errors
    server.reset(after_deltas=3)  # the connection of the next request is lost in the middle of its answer
    server.restart(down_s=0.5)  # all connections, answers and ids of requests are gone
    server.health = "draining"

A test that waits for nothing gives it a ManualClock, and calls `advance` once the request is accepted.
`FakeServer`'s own description has the rest.
"""

from __future__ import annotations

from cierzo.engine.testing.paced_core import ManualClock
from cierzo.engine.testing.script import Answer, Answers, FakeAnswer
from cierzo.engine.testing.server import FakeServer

__all__ = ["Answer", "Answers", "FakeAnswer", "FakeServer", "ManualClock"]

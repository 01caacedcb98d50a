"""`cierzo.testing` of a model that takes images."""

from __future__ import annotations

import pytest
from image_files import picture

from cierzo.engine.errors import InvalidRequest, Overloaded
from cierzo.engine.frontend.client import SyncClient
from cierzo.testing import FakeServer

SEEN = {"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]}


def test_an_image_is_attached_and_answered():
    file = picture(60, 90)
    with FakeServer({"What?": "A cat."}, takes_images=True) as server, SyncClient(server.address) as client:
        final = client.complete(messages=SEEN, images=file)
        assert final.samples[0].text == "A cat."
        assert final.usage.prompt_tokens == len("[user]What?") + 4 * 4  # rows of 3, each with what ends it
        assert [*server.requests[0].images] == [file]
        server.refuse(Overloaded, when=lambda message: message.images)
        with pytest.raises(Overloaded):
            client.ask(messages=SEEN, images=[file])
        assert client.ask(messages=[{"role": "user", "content": "What?"}]).text == "A cat."


def test_images_are_refused_as_by_any_server():
    with (
        FakeServer() as server,
        SyncClient(server.address) as client,
        pytest.raises(InvalidRequest, match="takes text alone"),
    ):
        client.ask(messages=SEEN, images=[picture()])
    limits = {"max_images": 2, "max_image_pixels": 2000, "max_image_tokens": 15}
    with FakeServer(takes_images=True, **limits) as server, SyncClient(server.address) as client:
        for images, field in (
            ([], "messages[0].content[1]"),
            ([b"no image"], "messages[0].content[1]"),
            ([picture(50, 41)], "messages[0].content[1]"),
            ([picture(1, 1)] * 2, "images[1]"),
            ([picture(1, 1)] * 3, "images"),
            ([picture(400, 5)], "messages[0].content[1]"),
        ):
            with pytest.raises(InvalidRequest) as caught:
                client.ask(messages=SEEN, images=images)
            assert caught.value.field == field
            assert caught.value.limit
        assert not server.requests
        assert client.ask(messages=SEEN, images=[picture()]).text == "This is a test."

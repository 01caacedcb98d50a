"""Images over the RPC: in the message, attached, as data URLs; what is refused, and what is kept for how long."""

from __future__ import annotations

import asyncio
import base64
from contextlib import asynccontextmanager
from hashlib import blake2b

import msgspec
import pytest
from image_files import IMG, VISION, animated, bomb, picture
from tekken_folders import write_tekken

from cierzo.engine.frontend.client import Client
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.encoders import Encoders
from cierzo.engine.frontend.encoding import Setup
from cierzo.engine.messages import (
    FEATURES,
    Attach,
    Cancel,
    ChatMessage,
    Failure,
    Final,
    Generate,
    GetModel,
    Hello,
    ImageChunk,
    ModelInfo,
    Pixels,
    SamplingParams,
    Submit,
    TextChunk,
    Tokenize,
    Tokenized,
    Welcome,
)
from cierzo.engine.testing.words import fake_model
from cierzo.engine.text.image_tokens import Images
from cierzo.engine.text.images import ImageLimits, prepare
from cierzo.engine.text.prompt import PromptEncoder

WANTS = Hello(features=[*FEATURES])
ONE = SamplingParams(max_tokens=1)
LIMITS = ImageLimits(max_images=16, max_image_bytes=1 << 20, max_image_pixels=50_000_000, max_image_tokens=16_384)
FILES = [picture(60, 90, seed=1), picture(30, 30, "JPEG", seed=2), picture(200, 10, "GIF", seed=3)]
PARTS = [ImageChunk(), TextChunk(text="and"), ImageChunk(), TextChunk(text="?"), ImageChunk()]
TURN = ChatMessage(role="user", content=PARTS)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return PromptEncoder.load(write_tekken(tmp_path_factory.mktemp("tekken")))


@pytest.fixture
def seeing(serving, peering, words, cores):
    """A front end of a model that takes images, and a connection."""

    @asynccontextmanager
    async def start(hello=WANTS, vision=VISION, **limits):
        model = fake_model(vocab_size=words.tokenizer.num_tokens, vision=vision, max_model_len=20_000)
        async with serving(cores=cores, words=words, model=model, **limits) as house, peering(house, hello) as peer:
            yield house, peer
        assert house.frontend.budget.num_bytes == 0
        assert house.frontend.heap.num_bytes == 0

    return start


def expected(words, turns=(TURN,), files=FILES):
    fields = [f"images[{number}]" for number in range(len(files))]
    images = Images(prepare(files, fields, VISION, LIMITS), VISION)
    return words.encode(Generate(stream=0, messages=[*turns]), None, images)


def images_of(heard):
    """The images of the last request of these commands, with their pixels put together."""
    submit = heard[-1]
    assert isinstance(submit, Submit)
    data: dict[bytes, bytearray] = {}
    for piece in heard[:-1]:
        if isinstance(piece, Pixels):
            own = data.setdefault(piece.digest, bytearray())
            assert piece.start == len(own)
            own += piece.data
            assert len(own) <= piece.size
    assert all(not image.pixels for image in submit.images)
    return [msgspec.structs.replace(image, pixels=bytes(data[image.digest])) for image in submit.images]


def url(file, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"


@pytest.mark.parametrize(
    "way", ["in the message", "attached", "attached in pieces", "all attached", "urls", "mixed"]
)
def test_images_come_before_their_request_to_the_core(run, seeing, words, cores, way):
    async def body():
        async with seeing() as (_house, peer):
            generate = Generate(stream=3, messages=[TURN], sampling=ONE)
            if way == "in the message":
                generate = msgspec.structs.replace(generate, images=FILES)
            elif way in ("urls", "mixed"):
                urls = [ImageChunk(url=url(file)) for file in FILES]
                parts = [urls[0], PARTS[1], PARTS[2] if way == "mixed" else urls[1], PARTS[3], urls[2]]
                turns = [ChatMessage(role="user", content=parts)]
                images = [FILES[1]] if way == "mixed" else []
                generate = msgspec.structs.replace(generate, messages=turns, images=images)
            else:
                piece = 1000 if way == "attached in pieces" else 1 << 20
                for number, file in enumerate(FILES):
                    for start in range(0, len(file), piece):
                        peer.say(Attach(stream=3, data=file[start : start + piece], image=number))
            if way == "all attached":
                data = msgspec.msgpack.encode([TURN])
                peer.say(Attach(stream=3, data=data[:10]))
                peer.say(Attach(stream=3, data=data[10:]))
                generate = msgspec.structs.replace(generate, messages=None, attached="messages")
            peer.say(generate)
            final = await peer.hear_until(Final)
            prompt = expected(words)
            assert final.usage.prompt_tokens == len(prompt.token_ids)
            assert cores.now.heard[-1].prompt_token_ids == prompt.token_ids
            assert images_of(cores.now.heard) == prompt.images

    run(body())


def test_pixels_are_kept_until_the_request_ends_and_a_new_core_gets_them_again(run, seeing, words, cores):
    cores.free = False

    async def body():
        async with seeing() as (house, peer):
            peer.say(Generate(stream=3, messages=[TURN], images=FILES, sampling=ONE))
            await cores.until(lambda: any(isinstance(each, Submit) for each in cores.now.heard))
            prompt = expected(words)
            assert house.frontend.heap.num_bytes >= sum(len(image.pixels) for image in prompt.images)
            assert house.frontend.budget.num_bytes == 0
            first = cores.now
            first.kill()
            await cores.until(lambda: cores.now is not first and cores.now.submits)
            assert images_of(cores.now.heard) == prompt.images
            cores.go_on()
            assert isinstance(await peer.hear_until(Final), Final)
            assert house.frontend.heap.num_bytes < 10_000

    run(body())


@pytest.mark.parametrize("end", ["cancelled", "disconnected", "orphaned", "late"])
def test_pixels_go_with_their_request_however_it_ends(run, seeing, peering, cores, end):
    cores.free = False
    features = [each for each in FEATURES if each != "resume" or end == "orphaned"]

    async def body():
        async with seeing(orphan_s=0.1) as (house, other):
            heap = house.frontend.heap
            async with peering(house, Hello(features=features)) as peer:
                deadline_s = 0.2 if end == "late" else 60.0
                peer.say(Generate(stream=3, messages=[TURN], images=FILES, sampling=ONE, deadline_s=deadline_s))
                await cores.until(lambda: any(isinstance(each, Submit) for each in cores.now.heard))
                assert heap.num_bytes > 100_000
                if end == "cancelled":
                    peer.say(Cancel(stream=3))
                if end in ("cancelled", "late"):
                    final = await peer.hear_until(Final)
                    assert final.samples[0].finish_reason == ("deadline" if end == "late" else end)
            while heap.num_bytes:
                await asyncio.sleep(0.01)
            cores.go_on()
            other.say(Generate(stream=4, messages=[TURN], images=FILES, sampling=ONE))
            assert isinstance(await other.hear_until(Final), Final)

    run(body())


def test_where_there_is_no_room_for_pixels_a_request_is_refused(run, seeing, words, cores):
    num_bytes = sum(len(image.pixels) for image in expected(words).images)

    async def body():
        async with seeing(max_kept_bytes=num_bytes) as (_, peer):
            peer.say(Generate(stream=3, messages=[TURN], images=FILES, sampling=ONE))
            error = await peer.hear_until(Failure)
            assert (error.code, error.field) == ("overloaded", "max_kept_bytes")
            assert f"{num_bytes} bytes of images" in error.message
            peer.say(Generate(stream=3, text="a", sampling=ONE))
            assert isinstance(await peer.hear_until(Final), Final)

    run(body())


def test_limits_and_the_model_s_vision_are_told_with_the_feature(run, seeing, peering):
    async def body():
        async with seeing(max_images=5, max_image_tokens=99) as (house, peer):
            peer.say(GetModel(stream=1))
            assert (await peer.hear_until(ModelInfo)).vision == VISION
            for features, told in ((["images"], (5, 20 << 20, 50_000_000, 99)), ([], (0, 0, 0, 0))):
                async with peering(house, None) as other:
                    other.say(Hello(features=features))
                    limits = (await other.hear_until(Welcome)).limits
                    found = (
                        limits.max_images,
                        limits.max_image_bytes,
                        limits.max_image_pixels,
                        limits.max_image_tokens,
                    )
                    assert found == told
                    other.say(GetModel(stream=1))
                    assert ((await other.hear_until(ModelInfo)).vision is None) == (not features)

    run(body())


IMAGE = [ChatMessage(role="user", content=[TextChunk(text="a"), ImageChunk()])]
TWO = [ChatMessage(role="user", content=[ImageChunk(), TextChunk(text="a"), ImageChunk()])]


def seen(**fields):
    return [ChatMessage(role="user", content=[ImageChunk(**fields)])]


TRUE = blake2b(FILES[0], digest_size=16).digest()
REFUSED = {
    "a part without bytes": ({"messages": IMAGE}, "messages[0].content[1]", "1 files of images", "0"),
    "one part of two": ({"messages": TWO, "images": FILES[:1]}, "messages[0].content[2]", "2 files of images", "1"),
    "bytes without a part": ({"messages": IMAGE, "images": FILES[:2]}, "images[1]", "1", "2"),
    "bytes for a text turn": (
        {"messages": [ChatMessage(role="user", content="a")], "images": FILES[:1]}, "images[0]", "0", "1"),
    "bytes for a text": ({"text": "a", "images": FILES[:1]}, "images", "with messages or token_ids", "1"),
    "bytes for token ids": ({"token_ids": [1, 5], "images": FILES[:1]}, "token_ids", None, "2"),
    "token ids without bytes": ({"token_ids": [1, IMG]}, "token_ids", "no image tokens", str(IMG)),
    "a digest that lies": (
        {"messages": seen(digest=TRUE), "images": [FILES[1]]}, "messages[0].content[0].digest", None, TRUE.hex()),
    "a digest that lies of a url": (
        {"messages": seen(digest=bytes(16), url=url(FILES[0]))}, "messages[0].content[0].digest", TRUE.hex(),
        "00" * 16),
    "a digest that is none": (
        {"messages": seen(digest=b"abc"), "images": FILES[:1]}, "messages[0].content[0].digest", "16 bytes", "3"),
    "no image": ({"messages": IMAGE, "images": [b"hello"]}, "messages[0].content[1]", "PNG, JPEG, WEBP, GIF", None),
    "no bytes": ({"messages": IMAGE, "images": [b""]}, "messages[0].content[1]", "PNG, JPEG, WEBP, GIF", None),
    "truncated": ({"messages": IMAGE, "images": [FILES[0][:500]]}, "messages[0].content[1]", None, None),
    "animated": ({"messages": IMAGE, "images": [animated("WEBP")]}, "messages[0].content[1]", None, "3"),
    "enormous": ({"messages": IMAGE, "images": [bomb()]}, "messages[0].content[1]", "50000000 pixels", "144000000"),
    "long": ({"messages": IMAGE, "images": [bytes(1001)]}, "messages[0].content[1]", "1000 bytes", "1001"),
    "in disguise": (
        {"messages": seen(url=url(picture(9, 9, "BMP")))}, "messages[0].content[0]", "PNG, JPEG, WEBP, GIF", None),
    "too many": ({"messages": TWO * 3, "images": FILES * 2}, "messages[2].content[0]", "4", "6"),
    "too many tokens": (
        {"messages": TWO, "images": [picture(90, 90)] * 2}, "messages[0].content[2]", "30 tokens", "40"),
    "a file's url": ({"messages": seen(url="file:///etc/passwd")}, "messages[0].content[0].url", None, None),
    "a path": ({"messages": seen(url="/etc/passwd")}, "messages[0].content[0].url", None, "/etc/passwd"),
    "an address": ({"messages": seen(url="https://a.example/b.png")}, "messages[0].content[0].url", None, None),
    "a data url of text": ({"messages": seen(url="data:text/plain,abc")}, "messages[0].content[0].url", None, None),
    "no base64": ({"messages": seen(url="data:image/png;base64,a")}, "messages[0].content[0].url", "base64", None),
    "other letters": (
        {"messages": seen(url="data:image/png;base64,aG\u00e9G8=")}, "messages[0].content[0].url", "base64", None),
    "a long url": ({"messages": seen(url=url(bytes(2000)))}, "messages[0].content[0].url", "1000 bytes", None),
    "a system turn": (
        {"messages": [ChatMessage(role="system", content=[ImageChunk()])], "images": FILES[:1]},
        "messages[0].content[0]", "a turn of the role user or tool", "system"),
    "an assistant's turn": (
        {"messages": [ChatMessage(role="assistant", content=[ImageChunk()], prefix=True)], "images": FILES[:1]},
        "messages[0].content[0]", "a turn of the role user or tool", "assistant"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_told_and_the_server_lives_on(run, seeing, cores, case):
    fields, field, limit, value = REFUSED[case]
    limits = {"max_images": 4, "max_image_tokens": 30 if case == "too many tokens" else 9000}
    if case in ("long", "a long url"):
        limits["max_image_bytes"] = 1000

    async def body():
        async with seeing(**limits) as (_, peer):
            peer.say(Generate(stream=3, sampling=ONE, **fields))
            error = await peer.hear_until(Failure)
            assert (error.code, error.field) == ("invalid_request", field)
            assert limit is None or error.limit == limit
            assert value is None or error.value == value
            assert error.limit
            assert error.value
            assert not cores.now.heard
            peer.say(Generate(stream=3, messages=IMAGE, images=[picture(9, 9)], sampling=ONE))
            if case not in ("long", "a long url"):
                assert isinstance(await peer.hear_until(Final), Final)

    run(body())


@pytest.mark.parametrize(
    "fields", [{"messages": IMAGE, "images": FILES[:1]}, {"messages": seen(url=url(FILES[0]))}]
)
def test_a_model_of_text_refuses_images(run, seeing, fields):
    async def body():
        async with seeing(vision=None) as (_, peer):
            peer.say(Generate(stream=3, **fields))
            error = await peer.hear_until(Failure)
            assert error.field.startswith("messages[0].content[")
            assert (error.limit, error.value) == ("text", "an image")

    run(body())


ATTACHED = {
    "out of order": ([(1, b"a")], "image", "0", "1"),
    "back again": ([(0, b"a"), (1, b"b"), (0, b"c")], "image", "1 or 2", "0"),
    "less than none": ([(-1, b"a")], "image", "0", "-1"),
    "too many": ([(0, b"a"), (1, b"b"), (2, b"c")], "image", "2", "3"),
    "too long": ([(0, bytes(60)), (0, bytes(60))], "images[0]", "100 bytes", "120"),
    "too long for all": ([(0, bytes(90)), (1, bytes(90))], "max_attached_bytes", "150", "180"),
}


@pytest.mark.parametrize("case", ATTACHED)
def test_attached_images_come_in_order_and_within_limits(run, seeing, cores, case):
    pieces, field, limit, value = ATTACHED[case]

    async def body():
        async with seeing(max_images=2, max_image_bytes=100, max_attached_bytes=150) as (house, peer):
            for number, data in pieces:
                peer.say(Attach(stream=3, data=data, image=number))
            error = await peer.hear_until(Failure)
            assert (error.stream, error.field, error.limit, error.value) == (3, field, limit, value)
            peer.say(Attach(stream=3, data=b"more", image=0))
            peer.say(Generate(stream=3, messages=IMAGE, sampling=ONE))  # passed over: its error has come
            assert await peer.hear_so_far() == []
            assert house.frontend.budget.num_bytes == 0
            peer.say(Attach(stream=3, data=b"again", image=0))
            peer.say(Cancel(stream=3))
            peer.say(Generate(stream=3, messages=IMAGE, sampling=ONE))
            assert (await peer.hear_until(Failure)).field == "messages[0].content[1]"

    run(body())


def test_images_come_one_way_or_the_other(run, seeing):
    async def body():
        async with seeing() as (_, peer):
            peer.say(Attach(stream=3, data=FILES[0], image=0))
            peer.say(Generate(stream=3, messages=TWO, images=FILES[1:2], sampling=ONE))
            error = await peer.hear_until(Failure)
            assert (error.field, error.limit, error.value) == ("images", "attached or in generate", "2")
            peer.say(Attach(stream=3, data=FILES[0], image=0))
            peer.say(Generate(stream=3, text="a", sampling=ONE))
            assert (await peer.hear_until(Failure)).field == "images"

    run(body())


@pytest.mark.parametrize(
    ("said", "field"),
    [
        (Generate(stream=3, messages=IMAGE), "messages[0].content[1]"),
        (Generate(stream=3, token_ids=[1], images=[b"a"]), "images"),
        (Attach(stream=3, data=b"a", image=0), "image"),
    ],
)
def test_without_the_feature_there_are_no_images(run, seeing, said, field):
    async def body():
        async with seeing(Hello(features=["attach", "parts"])) as (_, peer):
            peer.say(said)
            error = await peer.hear_until(Failure)
            assert (error.field, error.limit) == (field, "with the feature images")

    run(body())


def test_an_idempotency_key_knows_the_images(run, seeing, cores):
    async def body():
        async with seeing() as (_, peer):
            first = Generate(stream=3, messages=IMAGE, images=FILES[:1], sampling=ONE, idempotency_key="k")
            peer.say(first)
            await peer.hear_until(Final)
            peer.say(Attach(stream=4, data=FILES[0], image=0))
            peer.say(msgspec.structs.replace(first, stream=4, images=[]))
            assert (await peer.hear_until(Final)).stream == 4
            assert len(cores.now.submits) == 1
            peer.say(msgspec.structs.replace(first, stream=5, images=FILES[1:2]))
            assert (await peer.hear_until(Failure)).code == "key_reused"

    run(body())


def test_tokens_of_a_conversation_with_images_can_be_asked_for(run, seeing, words):
    async def body():
        async with seeing() as (_, peer):
            peer.say(Tokenize(stream=3, messages=seen(url=url(FILES[0]))))
            assert (await peer.hear_until(Tokenized)).token_ids == expected(words, seen(), FILES[:1]).token_ids

    run(body())


@pytest.mark.parametrize("max_frame_bytes", [4 << 20, 2000])
def test_the_client_sends_images_in_the_message_or_ahead_of_it(run, seeing, words, cores, max_frame_bytes):
    async def body():
        limits = {"max_frame_bytes": max_frame_bytes}
        async with seeing(**limits) as (house, _), await Client.connect(house.address) as client:
            turn = {"role": "user", "content": [msgspec.to_builtins(part) for part in PARTS]}
            final = await client.complete(messages=turn, images=FILES, max_tokens=1)
            assert final.usage.prompt_tokens == len(expected(words).token_ids)
            assert images_of(cores.now.heard) == expected(words).images
            theirs = {"type": "image_url", "image_url": {"url": url(FILES[1]), "detail": "auto"}}
            for part in (
                theirs,
                {"type": "image_url", "image_url": url(FILES[1])},
                {"type": "image", "url": url(FILES[1])},
            ):
                final = await client.complete(messages={"role": "user", "content": [part]}, max_tokens=1)
                assert final.usage.prompt_tokens == len(expected(words, seen(), FILES[1:2]).token_ids)
            one = {"role": "user", "content": [{"type": "image"}]}
            assert (await client.complete(messages=one, images=FILES[0], max_tokens=1)).usage.prompt_tokens

    run(body())


def test_encoder_processes_decode_images_and_outlive_what_is_none(run, serving, peering, cores, tmp_path):
    folder = write_tekken(tmp_path)
    words = PromptEncoder.load(folder)
    model = fake_model(vocab_size=words.tokenizer.num_tokens, vision=VISION, max_model_len=20_000)
    config = FrontendConfig()

    async def body():
        encoders = Encoders(config, Setup(checkpoint=str(folder), frontend=config, model=model))
        async with (
            serving(cores=cores, words=words, model=model, encoders=encoders) as house,
            peering(house, WANTS) as peer,
        ):
            for stream, file in enumerate((bomb(), b"", animated("PNG"), FILES[0][:-40])):
                peer.say(Attach(stream=stream, data=file, image=0))
                peer.say(Generate(stream=stream, messages=IMAGE, sampling=ONE))
            errors = [await peer.hear_until(Failure) for _ in range(4)]
            assert {error.field for error in errors} == {"messages[0].content[1]"}
            for number, file in enumerate(FILES):
                peer.say(Attach(stream=9, data=file, image=number))
            peer.say(Generate(stream=9, messages=[TURN], sampling=ONE))
            assert (await peer.hear_until(Final)).stream == 9
            assert images_of(cores.now.heard) == expected(words).images

    run(body(), 60.0)

"""Images in bodies of HTTP: data URLs, and addresses of hosts that the server's owner has named."""

from __future__ import annotations

import asyncio
import base64
import http.server
import ipaddress
import threading
from contextlib import contextmanager

import msgspec
import numpy as np
import pytest
from gateway_rules import MODEL, RULES
from http_house import HttpHouse
from image_files import VISION, picture

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend.arguments import generate_message
from cierzo.engine.frontend.pool import Pool
from cierzo.engine.gateway import fetching
from cierzo.engine.gateway.asked import read_chat, read_responses
from cierzo.engine.gateway.asked_images import address
from cierzo.engine.gateway.fetching import Fetching, is_public
from cierzo.engine.messages import ImageChunk, TextChunk
from cierzo.engine.text.image_tokens import Grid, grid_of

FILE, OTHER = picture(60, 90, seed=1), picture(30, 20, "JPEG", seed=2)
LONG = picture(150, 150, seed=3)  # 90 kB as text: read by a process of its own


def url(file):
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


def seeing(*answers, **options):
    """A server of a model that takes images."""
    return HttpHouse(*(answers or ["A cat."]), takes_images=True, **options)


def seen(house):
    """Sizes of the images of the last request, in tokens; each has its pixels."""
    images = house.core.submits[-1].images
    for image in images:
        assert len(image.pixels) == image.rows * image.columns * 28 * 28 * 12
        assert np.abs(np.frombuffer(image.pixels, "<f4")).max() < 4
    return [Grid(image.rows, image.columns) for image in images]


CAT, WIDE, SQUARE = grid_of(60, 90, VISION), grid_of(30, 20, VISION), grid_of(150, 150, VISION)
REMOTE = pytest.mark.parametrize("remote", [False, True], ids=["embedded", "gateway"])


@REMOTE
def test_a_chat_has_images_in_data_urls_in_its_order(remote):
    with seeing(remote=remote) as house:
        content = [
            {"type": "image_url", "image_url": {"url": url(FILE), "detail": "high"}},
            {"type": "text", "text": "or"},
            {"type": "image_url", "image_url": url(OTHER)},
        ]
        answer = house.openai().chat.completions.create(
            model="fake", messages=[{"role": "user", "content": content}]
        )
        assert answer.choices[0].message.content == "A cat."
        assert seen(house) == [CAT, WIDE]
        assert answer.usage.prompt_tokens == len("[user]or") + CAT.num_tokens + WIDE.num_tokens
        content.append({"type": "image_url", "image_url": {"url": url(LONG)}})
        house.openai().chat.completions.create(model="fake", messages=[{"role": "user", "content": content}])
        assert seen(house) == [CAT, WIDE, SQUARE]


@REMOTE
def test_a_response_s_input_has_images(remote):
    with seeing(remote=remote) as house:
        for file, grid in ((FILE, CAT), (LONG, SQUARE)):
            image = {"type": "input_image", "image_url": url(file), "detail": "auto"}
            content = [{"type": "input_text", "text": "What?"}, image]
            answer = house.openai().responses.create(model="fake", input=[{"role": "user", "content": content}])
            assert answer.output_text == "A cat."
            assert seen(house) == [grid]


def test_models_say_whether_they_see():
    with seeing() as house:
        assert house.get("/v1/models").json()["data"][0]["capabilities"]["vision"] is True
    with HttpHouse("Hi") as house:
        assert house.get("/v1/models").json()["data"][0]["capabilities"]["vision"] is False


IMAGE = "messages[0].content[0].image_url"
REFUSED = {
    "no image": ({"url": url(b"hello")}, "messages[0].content[0]", "PNG, JPEG, WEBP, GIF"),
    "truncated": ({"url": url(FILE[:300])}, "messages[0].content[0]", "PNG"),
    "no url": ({}, f"{IMAGE}.url", "missing"),
    "another type": (3, IMAGE, "a URL"),
    "no base64": ("data:image/png;base64,!", IMAGE, "base64"),
    "a file": ({"url": "file:///etc/passwd"}, f"{IMAGE}.url", "no address is fetched"),
    "an address": ({"url": "https://a.example/cat.png"}, f"{IMAGE}.url", "no address is fetched"),
    "a field": ({"url": url(FILE), "width": 3}, f"{IMAGE}.width", "unknown field"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_told_by_the_name_in_the_body(case):
    given, field, words = REFUSED[case]
    with seeing() as house:
        part = {"type": "image_url", "image_url": given}
        answer = house.post("/v1/chat/completions", {"messages": [{"role": "user", "content": [part]}]})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, field)
        assert words in error["message"]
        assert (
            house.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}).status_code == 200
        )


@pytest.mark.parametrize(
    ("limits", "said"), [({"max_images": 2}, "3 images"), ({"max_image_tokens": 20}, "tokens")]
)
def test_the_image_that_goes_beyond_a_limit_of_all_is_named(limits, said):
    with seeing(**limits) as house:
        chat = [{"type": "image_url", "image_url": {"url": url(OTHER)}} for _ in range(2)]
        chat += [{"type": "image_url", "image_url": {"url": url(FILE)}}]
        turns = [{"role": "user", "content": chat[:1]}, {"role": "user", "content": chat[1:]}]
        items = [{"type": "input_image", "image_url": url(file)} for file in (OTHER, OTHER, FILE)]
        for path, body, param in (
            ("chat/completions", {"messages": turns}, "messages[1].content[1]"),
            ("responses", {"input": [{"role": "user", "content": items}]}, "input[0].content[2]"),
        ):
            answer = house.post(f"/v1/{path}", body)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, param)
            assert said in error["message"]


def test_a_model_of_text_refuses_them():
    with HttpHouse("Hi") as house:
        part = {"type": "input_image", "image_url": url(FILE)}
        answer = house.post("/v1/responses", {"input": [{"role": "user", "content": [part]}]})
        assert answer.status_code == 400
        assert "text alone" in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] == "input[0].content[0]"


# --- addresses ---------------------------------------------------------------------------------------------

HOSTS = ("a.example", "b.example:8443")
RULES = msgspec.structs.replace(RULES, model=msgspec.structs.replace(MODEL, vision=VISION), image_hosts=HOSTS)


@pytest.mark.parametrize(
    "given",
    ["https://a.example/x.png", "http://A.EXAMPLE:80/", "https://a.example:443/?a=b", "https://b.example:8443/x"],
)
def test_addresses_of_named_hosts_are_noted(given):
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": given}}]
    body = msgspec.json.encode({"messages": [{"role": "user", "content": parts}]})
    asked = read_chat(body, RULES)
    assert asked.fetches == (("messages[0].content[1].image_url.url", given),)
    assert asked.arguments["messages"][0]["content"][1] == {"type": "image"}
    items = [{"role": "user", "content": [{"type": "input_image", "image_url": given}]}]
    asked = read_responses(msgspec.json.encode({"input": items}), RULES)
    assert asked.fetches == (("input[0].content[0].image_url", given),)


@pytest.mark.parametrize(
    "given",
    [
        *("https://c.example/x.png", "https://a.example.evil/x", "https://xa.example/", "https://a.example:8443/x"),
        *(
            "https://b.example/x",
            "http://b.example:443/",
            "ftp://a.example/x",
            "file:///etc/passwd",
            "file://a.example/",
        ),
        *(
            "https://user@a.example/x",
            "https://a.example@c.example/x",
            "https://a.example\\@c.example/",
            "//a.example/x",
        ),
        *(
            "https://a.example /x",
            "https://a.example/\r\nx",
            "https://\u0430.example/",
            "https://[::1]/",
            "https:///x",
        ),
        *(
            "https://a.example:99999/",
            "gopher://a.example/",
            "a.example/x.png",
            "",
            "https://a.example/" + "x" * 9000,
        ),
    ],
)
def test_all_other_addresses_are_refused(given):
    with pytest.raises(InvalidRequest) as error:
        address("here", given, HOSTS)
    assert error.value.field == "here"
    assert "http or https of: a.example, b.example:8443" in error.value.limit


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        *(("1.1.1.1", True), ("2606:4700::1111", True), ("::ffff:1.1.1.1", True), ("64:ff9b::101:101", True)),
        *(("127.0.0.1", False), ("10.0.0.1", False), ("192.168.1.1", False), ("169.254.169.254", False)),
        *(("0.0.0.0", False), ("100.64.0.1", False), ("224.0.0.1", False), ("255.255.255.255", False)),
        *(("::1", False), ("::", False), ("fe80::1", False), ("fc00::1", False), ("ff02::1", False)),
        *(("::ffff:127.0.0.1", False), ("64:ff9b::7f00:1", False), ("2002:7f00:1::", False)),
    ],
)
def test_addresses_of_this_machine_and_of_its_networks_are_private(found, expected):
    assert is_public(ipaddress.ip_address(found)) == expected


class Files(http.server.BaseHTTPRequestHandler):
    """Serves pictures, and what no client should trust."""

    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Host"]))
        match self.path:
            case "/redirect":
                self.send_response(302)
                self.send_header("Location", "/cat.png")
                self.send_header("Content-Length", "0")
                self.end_headers()
            case "/missing":
                self.send_error(404)
            case "/announced":
                self.head({"Content-Length": str(10**9)})
            case "/endless":
                self.head({})
                with self.quiet():
                    while True:
                        self.wfile.write(bytes(65536))
            case "/slow":
                self.head({"Content-Length": "9"})
                threading.Event().wait(1.5)
            case "/short":
                self.head({"Content-Length": str(len(FILE))})
                self.wfile.write(FILE[:100])
            case "/compressed":
                self.head({"Content-Encoding": "gzip", "Content-Length": "3"})
                self.wfile.write(b"abc")
            case "/headers":
                with self.quiet():
                    self.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 99_999)
            case "/none":
                self.wfile.write(b"SSH-2.0\r\n")
            case "/chunked":
                self.protocol_version = "HTTP/1.1"
                self.head({"Transfer-Encoding": "chunked"})
                self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(FILE), FILE))
            case "/unmeasured":
                self.head({})
                self.wfile.write(FILE)
            case _:
                self.head({"Content-Length": str(len(FILE))})
                self.wfile.write(FILE)

    def head(self, headers):
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    @contextmanager
    def quiet(self):
        try:
            yield
        except OSError:
            self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def files():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    server.daemon_threads = True
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def at(files, path):
    return f"http://localhost:{files.server_port}{path}"


def fetched(files, *paths, max_bytes=100_000, allows=lambda _: True):
    async def body():
        pool = Pool("max_arriving_bytes", 300_000)
        client = Fetching((f"localhost:{files.server_port}",), max_bytes, pool, allows=allows)
        try:
            return await client.fetch(
                [(f"images[{n}]", at(files, path)) for n, path in enumerate(paths)], "default"
            )
        finally:
            assert pool.num == 0

    return asyncio.run(body())


def test_files_are_fetched_in_order(files):
    assert fetched(files, "/cat.png?a=b", "/chunked", "/unmeasured") == [FILE] * 3
    assert ("/cat.png?a=b", f"localhost:{files.server_port}") in files.asked


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(("/redirect", "302"), ("/missing", "404"), ("/announced", "1000000000"), ("/endless", None)),
        *(("/slow", "longer"), ("/short", None), ("/compressed", "gzip"), ("/headers", None), ("/none", None)),
    ],
)
def test_what_is_no_plain_answer_is_refused(files, path, value, monkeypatch):
    monkeypatch.setattr(fetching, "FETCH_S", 0.5)
    with pytest.raises(InvalidRequest) as error:
        fetched(files, "/cat.png", path)
    assert error.value.field == "images[1]"
    assert error.value.limit
    assert value is None or error.value.value == value
    assert ("/cat.png", "") not in files.asked


def test_nothing_is_fetched_from_this_machine_or_its_networks(files):
    files.asked.clear()
    with pytest.raises(InvalidRequest) as error:
        fetched(files, "/cat.png", allows=is_public)
    assert (error.value.limit, files.asked) == ("a public address", [])


def test_a_name_is_resolved_once_and_all_its_addresses_must_be_public(files, monkeypatch):
    asked = []

    async def resolve(host, port, **_):
        asked.append(host)
        return [(0, 0, 0, "", (where, port)) for where in ("1.1.1.1", "10.0.0.1")]

    async def body():
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
        await Fetching(("a.example",), 99, Pool("p", 9999)).fetch([("here", "http://a.example/")], "default")

    with pytest.raises(InvalidRequest) as error:
        asyncio.run(body())
    assert (error.value.limit, asked) == ("a public address", ["a.example"])


@REMOTE
def test_images_of_named_hosts_reach_the_model(files, remote):
    name = f"localhost:{files.server_port}"
    with seeing(remote=remote, http={"allow_image_hosts": (name,)}) as house:
        house.door._house.fetching._allows = lambda _: True
        for more in ([], [{"type": "image_url", "image_url": url(LONG)}]):
            content = [{"type": "image_url", "image_url": {"url": at(files, "/cat.png")}}, *more]
            body = {"messages": [{"role": "user", "content": content}]}
            assert house.post("/v1/chat/completions", body).status_code == 200
            assert seen(house) == [CAT, *([SQUARE] if more else [])]
        part = {"type": "image_url", "image_url": {"url": at(files, "/redirect")}}
        answer = house.post("/v1/chat/completions", {"messages": [{"role": "user", "content": [part]}]})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, f"{IMAGE}.url")
        with seeing(http={"allow_image_hosts": (name,)}) as strict:
            answer = strict.post("/v1/chat/completions", body)
            assert "cannot be fetched: its host is at no public address" in answer.json()["error"]["message"]


def test_parts_of_the_clients_are_read_as_the_engine_has_them():
    parts = [{"type": "image_url", "image_url": {"url": url(FILE)}}, {"type": "text", "text": "?"}]
    message = generate_message(
        **read_chat(msgspec.json.encode({"messages": [{"role": "user", "content": parts}]}), RULES).arguments
    )
    assert message.messages[0].content == [ImageChunk(url=url(FILE)), TextChunk(text="?")]

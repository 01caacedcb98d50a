"""The page at / in a browser: what it shows of the server, colours, sizes, keyboard, and what may be in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import PHONE, WIDE, Browser
from http_house import HttpHouse
from page_server import PageServer, figures, page_server
from selenium.webdriver.common.keys import Keys

from cierzo.engine.frontend.keys import key_line
from cierzo.engine.frontend.observe.tallies import BOUNDS_S
from cierzo.engine.gateway.guard import CSP
from cierzo.engine.gateway.site import FOLDER, assets
from cierzo.engine.gateway.state import Latency, percentile

MAX_BYTES = 100_000
MAX_PAINT_MS = 500
NONE = "\N{EN DASH}"
MARKUP_OF_TEXT = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|setHTML"
MIN_CONTRAST = 4.5  # of text, WCAG 2 AA


@pytest.fixture
def page() -> Iterator[PageServer]:
    with page_server() as server:
        yield server


@pytest.fixture(autouse=True)
def _no_complaints(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test may make the browser complain: of scripts that fail, or of what the policy forbids."""
    yield
    if "window" in request.fixturenames:
        assert not request.getfixturevalue("window").complaints()


class Growing:
    """A server whose counters grow by so much in each second of its own time, which is one a question."""

    def __init__(self, **per_second: int) -> None:
        self.per_second = per_second
        self.num = 0

    def __call__(self):
        self.num += 1
        base = figures()
        grown = {name: getattr(base, name) + by * self.num for name, by in self.per_second.items()}
        return figures(uptime_s=base.uptime_s + self.num, **grown)


# --- files --------------------------------------------------------------------------------------------------


def test_all_files_together_are_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < MAX_BYTES


def test_every_file_is_served_and_none_is_from_elsewhere() -> None:
    served = assets()
    assert len(served) == len([*FOLDER.iterdir()]), "a file of a kind that has no media type"
    names = {path.removeprefix("/") for path in served}
    for path, asset in served.items():
        text = asset.body.decode()
        asked = re.findall(r"""(?:src|href)="(?!data:|#)([^"]+)"|from "\./([^"]+)"|fetch\("([^"]+)\"""", text)
        for found in asked:
            source, module, answer = found
            assert answer in ("", "page/state", "v1/models", "v1/chat/completions"), path
            assert not source or source in names, path
            assert not module or f"page/{module}" in names, path
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", text), path
        assert not re.search(MARKUP_OF_TEXT, text), path


@pytest.fixture
def keyed(tmp_path: Path, opening: Callable[..., HttpHouse]) -> HttpHouse:
    """A house where "a-guest" may ask the model, and "an-owner" see figures too."""
    path = tmp_path / "keys"
    lines = ['{"tenant": "mail"}', key_line("a-guest", "mail"), key_line("an-owner", "mail", ("stats",))]
    path.write_text("\n".join(lines))
    path.chmod(0o600)
    return opening("Yes.", keys=str(path))


def test_files_come_with_a_tag_and_a_policy(keyed: HttpHouse) -> None:
    """Also where there are keys, which a browser cannot show for a page."""
    for path, asset in assets().items():
        answer = keyed.get(path)
        assert (answer.status_code, answer.content) == (200, asset.body)
        assert answer.headers["content-security-policy"] == CSP
        assert answer.headers["content-type"] == asset.kind.decode()
        again = keyed.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert len({asset.tag for asset in assets().values()}) == len(assets())
    assert "unsafe" not in CSP


def test_what_is_inline_is_not_run(window: Browser, page: PageServer) -> None:
    """The policy holds in the browser, not only in its words."""
    window.open(page.url)
    script = """
        const script = document.createElement("script");
        script.textContent = "window.ran = true";
        document.body.append(script);
        return window.ran ?? false;
    """
    assert window.run(script) is False
    assert any("Content Security Policy" in message for message in window.complaints())


def test_it_is_painted_soon(window: Browser, page: PageServer) -> None:
    """Or at another time: other programs may take the processors from one."""
    script = "return performance.getEntriesByName('first-contentful-paint').map((entry) => entry.startTime)"
    paints = [MAX_PAINT_MS]
    while min(paints) >= MAX_PAINT_MS and len(paints) < 10:
        window.open(page.url)
        paints += window.until(lambda: window.run(script))
    assert min(paints) < MAX_PAINT_MS


# --- figures ------------------------------------------------------------------------------------------------


def test_figures_are_the_states(window: Browser, page: PageServer) -> None:
    page.state = Growing(output_tokens=321, prompt_tokens=45_678)
    window.open(page.url)
    window.shows("#tile-out .figure", "321 per second")
    assert window.text("#tile-in .figure") == "45,678 per second"
    assert window.text("#tile-work .figure").split("\n") == ["6 running", "2 waiting"]
    assert window.text("#tile-kv .figure").split("\n") == ["42% used", "20% kept"]
    assert window.text("#state") == "ready"
    assert window.text("#served") == "small-4 bfloat16 · on cpu · 32,768 tokens of context · cierzo 0.1.0"
    assert window.driver.title == "small-4 · cierzo"
    assert [cell.text.replace("\n", " ") for cell in window.all("#counts div")] == [
        *("Accepted 120", "Finished 108", "Refused 4", "Open 8"),
        *("Connections 3", "Preemptions 1", "Restarts 0", "Up 1 min"),
    ]
    assert [row.text for row in window.all("#tenants tbody tr")] == [
        "default 80 9,000 1,500",
        "search 28 1,000 500",
    ]


def test_restarts_stand_out_and_notes_are_told(window: Browser, page: PageServer) -> None:
    page.state = figures(restarts=2, notes=["The certificate expires on Friday."], state="draining")
    window.open(page.url)
    window.shows("#notes", "The certificate expires on Friday.")
    assert window.one("[data-of=restarts].marked").text == "2"
    assert window.text("#state") == "draining"


def test_latencies_are_those_of_late_or_else_since_the_start(window: Browser, page: PageServer) -> None:
    page.state = figures()
    window.open(page.url)
    window.shows("#tile-first", "200 ms p50")
    assert "since the start" in window.text("#tile-first h2")
    late = Latency(0.2, 0.4, 0.5, [0] * 7 + [50, 50, 8] + [10] + [0] * 6)  # ten more of one to two seconds
    page.state = figures(uptime_s=101.0, first_token_s=late)
    window.shows("#tile-first h2", "last 30 s")
    assert window.text("#tile-first .figure").split("\n") == ["1.5 s p50", "1.9 s p90", "2.0 s p99"]


def test_percentiles_of_the_page_are_those_of_the_server(window: Browser, page: PageServer) -> None:
    window.open(page.url)
    columns = [[0] * 17, [1] * 17, [*range(17)], [0] * 16 + [3], [5] + [0] * 16, [0, 7, 0, 0, 2] + [0] * 11 + [1]]
    script = """
        const { percentile } = await import("/page/live.js");
        return given[0].map((counts) => given[2].map((share) => percentile(counts, given[1], share)));
    """
    shares = [0.01, 0.5, 0.9, 0.99, 1.0]
    found = window.run(script, columns, BOUNDS_S, shares)
    assert found == [[percentile(counts, share) for share in shares] for counts in columns]


def test_a_server_that_is_only_asked_has_no_latencies(window: Browser, page: PageServer) -> None:
    page.state = figures(latency_bounds_s=None, first_token_s=None, inter_token_s=None, tenants=None)
    window.open(page.url)
    window.shows("#tile-work", "6 running")
    assert window.text("#tile-first .figure").split("\n") == [f"{NONE} p50", f"{NONE} p90", f"{NONE} p99"]
    assert not window.one("#tenants").is_displayed()


def test_a_server_that_is_lost_is_told_and_found_again(window: Browser, page: PageServer) -> None:
    page.state = Growing(output_tokens=5)
    window.open(page.url)
    window.shows("#state", "ready")
    page.status = 500
    window.shows("#state", "out of reach")
    window.shows("#notes", "it answers with status 500")
    page.status = 200
    window.shows("#state", "ready")
    assert not window.one("#notes").is_displayed()
    line = window.one("#tile-work path.line.s0").get_attribute("d")
    assert line.count("M") == 2, "what is not known is a gap"


def test_counters_that_begin_anew_are_no_rate(window: Browser, page: PageServer) -> None:
    page.state = figures()
    window.open(page.url)
    window.shows("#state", "ready")
    page.state = figures(uptime_s=1.0, output_tokens=3)
    window.shows("[data-of=uptime_s]", "1 s")
    assert window.text("#tile-out .figure") == f"{NONE} per second"


def test_nothing_is_asked_while_nobody_looks(window: Browser, page: PageServer) -> None:
    window.open(page.url)
    window.shows("#state", "ready")
    script = """
        window.waits ??= [];
        const real = window.real ??= window.setTimeout.bind(window);
        window.setTimeout = (act, ms, ...rest) => {
          if (ms < 10_000) window.waits.push(ms); // longer ones are the driver's
          return real(act, ms, ...rest);
        };
        Object.defineProperty(document, "hidden", { value: given[0], configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    """
    window.run(script + "await new Promise((done) => real(done, 0)); window.waits.length = 0;", True)
    window.run(script, True)
    assert window.run("return window.waits") == [], "no next question is planned"
    asked = page.num_states
    window.run(script, False)
    window.until(lambda: page.num_states > asked)
    window.until(lambda: 1000 in window.run("return window.waits"))


def test_charts_can_be_read_point_by_point(window: Browser, page: PageServer) -> None:
    page.state = Growing(running=1)
    window.open(page.url)
    window.until(lambda: (shown := window.text("#tile-work .figure")) and int(shown.split()[0]) >= 8)
    chart = window.one("#tile-work svg")
    chart.send_keys(Keys.ARROW_LEFT)
    window.shows("#tile-work h2", "1 s ago")
    older = int(window.text("#tile-work .figure b").split("\n")[0])
    newer = int(re.search(r"running (\d+)", chart.get_attribute("aria-label"))[1])
    assert older < newer
    assert window.one("#tile-work svg .look").get_attribute("d")
    chart.send_keys(Keys.TAB)
    window.until(lambda: "ago" not in window.text("#tile-work h2"))


def test_scales_end_at_round_numbers(window: Browser, page: PageServer) -> None:
    window.open(page.url)
    script = 'const { ceiling } = await import("/page/chart.js"); return given[0].map(ceiling);'
    values = [0, 0.25, 1, 1.01, 2, 4.9, 10, 999, 1001, 0.0012]
    assert window.run(script, values) == pytest.approx([1, 0.3, 1, 1.5, 2, 5, 10, 1000, 1500, 0.0015])


# --- keys and rights ----------------------------------------------------------------------------------------


def test_the_key_is_asked_for_and_kept_nowhere(window: Browser, page: PageServer) -> None:
    page.key = "a-secret"
    window.open(page.url)
    window.shows("#notes", "asks for a key")
    assert not window.one("#tiles").is_displayed()
    window.one("#key-box summary").click()
    window.until(lambda: window.driver.switch_to.active_element == window.one("#key"))
    window.driver.switch_to.active_element.send_keys("a-secret", Keys.ENTER)
    window.shows("#tile-work", "6 running")
    assert not window.one("#notes").is_displayed()
    kept = "return JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])"
    assert "a-secret" not in window.run(kept)
    window.open(page.url)
    window.shows("#notes", "asks for a key")


def test_a_key_that_is_not_known_is_told_apart_from_none(window: Browser, page: PageServer) -> None:
    page.key = "sesame"
    window.open(page.url)
    window.shows("#notes", "asks for a key")
    window.one("#key-box summary").click()
    window.one("#key").send_keys("simsim", Keys.ENTER)
    window.shows("#notes", "does not know this key")


def test_who_may_not_see_figures_may_chat(window: Browser, page: PageServer) -> None:
    page.status = 403
    window.open(page.url)
    window.shows("#no-figures", "no right")
    assert window.text("#model") == "small-4-id"
    assert not window.one("#notes").is_displayed()


# --- sight, and hands ---------------------------------------------------------------------------------------


CONTRASTS = """
    const channels = (colour) => {
      const context = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
      context.fillStyle = colour;
      context.fillRect(0, 0, 1, 1);
      return [...context.getImageData(0, 0, 1, 1).data];
    };
    const light = ([red, green, blue]) => {
      const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
      const [r, g, b] = [red, green, blue].map((c) => linear(c / 255));
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (element) => {
      for (; element; element = element.parentElement) {
        const colour = channels(getComputedStyle(element).backgroundColor);
        if (colour[3] === 255) return light(colour);
      }
    };
    const told = [];
    for (const element of document.querySelectorAll("body *")) {
      const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
      if (!own || !element.checkVisibility() || element.closest(".unseen, .skip, .scale")) continue;
      const [one, other] = [light(channels(getComputedStyle(element).color)), ground(element)];
      const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
      told.push([contrast, element.tagName + " " + element.textContent.trim().slice(0, 30)]);
    }
    return told;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(window: Browser, page: PageServer, scheme: str) -> None:
    page.state = figures(restarts=1, notes=["A note."])
    window.open(page.url, scheme=scheme)
    window.shows("#notes", "A note.")
    window.one("#settings summary").click()
    found = window.run(CONTRASTS)
    assert len(found) > 40
    assert not [told for told in found if told[0] < MIN_CONTRAST]


def test_colours_are_chosen_by_a_button_and_remembered(window: Browser, page: PageServer) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    window.open(page.url, scheme="dark")
    dark = window.run(ground)
    window.one("#theme").click()
    light = window.run(ground)
    assert light != dark

    def is_light_again() -> bool:
        """Chromium hands what is kept from one process to the next when it can, which need not be at once."""
        window.open(page.url, scheme="dark")
        return window.run(ground) == light

    window.until(is_light_again)
    window.one("#theme").click()
    assert window.run(ground) == dark
    window.one("#theme").click()
    assert window.one("#theme").get_attribute("aria-label") == "Colours: as the system"


@pytest.mark.parametrize("size", [WIDE, (1024, 700), PHONE, (320, 640)], ids=str)
def test_nothing_is_wider_than_the_window(window: Browser, page: PageServer, size: tuple[int, int]) -> None:
    window.open(page.url, size)
    window.shows("#state", "ready")
    for name in ("settings", "key-box"):
        window.one(f"#{name} summary").click()
        box = window.one(f"#{name} > :last-child").rect
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= size[0]
    width = "return document.documentElement.scrollWidth"
    wide = "return [...document.querySelectorAll('.figure')].filter((e) => e.scrollWidth > e.clientWidth).length"
    assert window.run(width) <= size[0]
    if size[0] > 960:
        assert window.one("#chat").is_displayed()
        assert window.one("#live").is_displayed()
        assert window.run(wide) == 0
        return
    assert not window.one("#live").is_displayed()
    window.one("nav [data-view=live]").click()
    assert window.one("#live").is_displayed()
    assert not window.one("#chat").is_displayed()
    assert window.run(width) <= size[0]
    assert window.run(wide) == 0


def test_every_control_is_reached_by_tab_and_has_a_name(window: Browser, page: PageServer) -> None:
    window.open(page.url)
    window.shows("#state", "ready")
    assert window.run("return document.querySelector('a, button, input, summary').className") == "skip"
    window.run("document.querySelector('.skip').focus()")
    reached = []
    for _ in range(40):
        window.driver.switch_to.active_element.send_keys(Keys.TAB)
        element = window.driver.switch_to.active_element
        if element.tag_name == "body" or element in reached:
            break
        assert element.accessible_name or element.tag_name == "summary", element.get_attribute("outerHTML")
        reached.append(element)
    ids = [element.get_attribute("id") for element in reached]
    assert {"theme", "question", "effort", "send"} <= {*ids}
    assert ids.index("theme") < ids.index("question") < ids.index("send")
    assert sum(element.tag_name == "svg" for element in reached) == 6, "charts"
    assert sum(element.get_attribute("class") == "idea" for element in reached) == 3


def test_a_slash_goes_to_the_question(window: Browser, page: PageServer) -> None:
    window.open(page.url)
    window.one("#theme").send_keys("/")
    assert window.driver.switch_to.active_element == window.one("#question")
    window.driver.switch_to.active_element.send_keys("/")
    assert window.one("#question").get_attribute("value") == "/"


# --- with a server ------------------------------------------------------------------------------------------


def test_it_shows_and_asks_a_server(window: Browser, either: Callable[..., HttpHouse]) -> None:
    """The page, the door and the front end together; and through a gateway, which knows less."""
    house = either("It is *scattered*.", http={"served_model_name": ("mine",)})
    window.open(house.url)
    window.shows("#state", "ready")
    window.one("#question").send_keys("Why is the sky blue?", Keys.ENTER)
    window.shows(".told .text", "It is scattered.")
    window.shows(".told .tools", "tokens")
    window.shows("[data-of=finished]", "1")
    assert window.text("#model") == "fake"
    is_gateway = house.get("/page/state").json()["tenants"] is None
    assert window.one("#tenants").is_displayed() is not is_gateway
    if not is_gateway:
        window.shows("#tenants tbody", "default 1")
        assert NONE not in window.text("#tile-first .figure")


def test_state_wants_the_right_stats(keyed: HttpHouse) -> None:
    found = [keyed.get("/page/state")]
    found += [
        keyed.get("/page/state", headers={"authorization": f"Bearer {key}"}) for key in ("a-guest", "an-owner")
    ]
    assert [answer.status_code for answer in found] == [401, 403, 200]
    assert found[2].json()["model_id"] == "fake"


def test_keys_and_their_rights_in_the_page(window: Browser, keyed: HttpHouse) -> None:
    window.open(keyed.url)
    window.shows("#notes", "asks for a key")
    window.one("#key-box summary").click()
    window.one("#key").send_keys("a-guest", Keys.ENTER)
    window.shows("#no-figures", "no right")
    window.one("#question").send_keys("May I?", Keys.ENTER)
    window.shows(".told .text", "Yes.")
    window.one("#key-box summary").click()
    window.one("#key").clear()
    window.one("#key").send_keys("an-owner", Keys.ENTER)
    window.shows("#tenants tbody", "mail 1")

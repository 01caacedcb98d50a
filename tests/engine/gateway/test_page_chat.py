"""Chat box of the page in a browser: what it asks of the server, what it shows of the answer, how it fails."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from browser import PHONE, Browser
from page_server import Event, PageServer, ask, chunk, figures, said
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from starlette.responses import JSONResponse

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def call(index: int, name: str = "", arguments: str = "", call_id: str = "") -> dict[str, Any]:
    """A chunk with a piece of a call."""
    piece: dict[str, Any] = {"index": index, "function": {"arguments": arguments}}
    if name:
        piece |= {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    return chunk(tool_calls=[piece])


def test_an_answer_is_shown_as_it_comes(window: Browser, page: PageServer) -> None:
    rest = threading.Event()
    page.answers.append(
        [chunk(role="assistant", content=""), chunk(content="Blue"), rest, *said(" by scattering.")]
    )
    ask(window, "Why?")
    window.shows(".told .text", "Blue")
    assert window.text(".asked") == "Why?"
    assert not window.one("#welcome").is_displayed()
    assert window.one("#stop").is_displayed()
    assert not window.one("#send").is_displayed()
    rest.set()
    window.shows(".told .text", "Blue by scattering.")
    window.shows(".told .tools", "3 tokens")
    assert "per second" in window.text(".told .tools")
    assert "first after" in window.text(".told .tools")
    assert window.one("#send").is_displayed()
    assert window.one("#spoken").get_property("textContent") == "Answer: Blue by scattering."
    assert page.asked == [
        {
            "model": "small-4-id",
            "messages": [{"role": "user", "content": "Why?"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 1024,
        }
    ]


def test_a_conversation_goes_on(window: Browser, page: PageServer) -> None:
    page.answers += [said("One."), said("Two."), said("Anew.")]
    for question, answer in (("First?", "One."), ("Second?", "Two.")):
        ask(window, question)
        window.shows(".told:last-child .text", answer)
        window.shows(".told:last-child .tools", "tokens")
    assert page.asked[1]["messages"] == [
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "Second?"},
    ]
    window.one("#new").click()
    assert window.one("#welcome").is_displayed()
    window.one(".idea").click()
    window.shows(".told .text", "Anew.")
    assert page.asked[2]["messages"] == [{"role": "user", "content": "Why is the sky blue?"}]


def test_settings_are_sent(window: Browser, page: PageServer) -> None:
    page.answers.append(said("Yes."))
    window.one("#effort").send_keys("high")
    window.one("#settings summary").click()
    window.one("#temperature").send_keys("0.25")
    window.one("#max-tokens").clear()
    window.one("#max-tokens").send_keys("7")
    window.one("#system").send_keys("Be brief.")
    window.one("#tools").send_keys(json.dumps([WEATHER]))
    ask(window, "Well?")
    window.shows(".told .text", "Yes.")
    (asked,) = page.asked
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {key: asked[key] for key in ("reasoning_effort", "temperature", "max_tokens", "tools")} == {
        "reasoning_effort": "high",
        "temperature": 0.25,
        "max_tokens": 7,
        "tools": [WEATHER],
    }


def test_what_is_not_set_is_left_out(window: Browser, page: PageServer) -> None:
    page.answers.append(said("Yes."))
    window.one("#settings summary").click()
    window.one("#max-tokens").clear()
    ask(window, "Well?")
    window.shows(".told .text", "Yes.")
    assert {*page.asked[0]} == {"model", "messages", "stream", "stream_options"}


def test_an_answer_fits_into_a_short_context(window: Browser, page: PageServer) -> None:
    page.state = figures(max_model_len=512)
    window.until(lambda: window.one("#max-tokens").get_attribute("value") == "256")
    page.answers.append(said("Yes."))
    ask(window, "Well?")
    window.shows(".told .text", "Yes.")
    assert page.asked[0]["max_tokens"] == 256


def test_a_setting_that_is_wrong_is_told_though_it_is_out_of_sight(window: Browser, page: PageServer) -> None:
    window.one("#settings summary").click()
    window.one("#temperature").send_keys("5", Keys.ESCAPE)
    assert not window.one("#temperature").is_displayed()
    ask(window, "Why?")
    window.until(lambda: window.driver.switch_to.active_element == window.one("#temperature"))
    assert window.one("#temperature").is_displayed()
    assert not page.asked


@pytest.mark.parametrize("text", ["[{", '{"type": "function"}'])
def test_tools_that_are_no_list_are_not_sent(window: Browser, page: PageServer, text: str) -> None:
    window.one("#settings summary").click()
    window.one("#tools").send_keys(text)
    ask(window, "Well?")
    window.shows("#tools-wrong", "JSON")
    assert window.driver.switch_to.active_element == window.one("#tools")
    assert window.one("#question").get_attribute("value") == "Well?"
    assert not page.asked


def test_thoughts_are_folded_away(window: Browser, page: PageServer) -> None:
    thoughts = [chunk(reasoning_content="Let me "), chunk(reasoning_content="see.")]
    page.answers += [[*thoughts, *said("Because.")], said("So.")]
    ask(window, "Why?")
    window.shows(".told .text", "Because.")
    window.shows(".thoughts summary", "Thought for")
    assert "Let me see." not in window.text(".told")
    window.one(".thoughts summary").send_keys(Keys.ENTER)
    assert window.text(".thoughts .text") == "Let me see."
    window.shows(".told .tools", "tokens")
    ask(window, "And?")
    window.shows(".told:last-child .text", "So.")
    content = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "Let me see."}]},
        {"type": "text", "text": "Because."},
    ]
    assert page.asked[1]["messages"][1] == {"role": "assistant", "content": content}


def test_thoughts_in_mistrals_chunks_are_the_same(window: Browser, page: PageServer) -> None:
    thoughts = [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm. "}]}]
    page.answers.append([chunk(content=thoughts), chunk(content=thoughts), *said("Because.")])
    ask(window, "Why?")
    window.shows(".told .text", "Because.")
    window.one(".thoughts summary").click()
    assert window.text(".thoughts .text") == "Hm. Hm. "


def test_output_is_text_and_never_markup(window: Browser, page: PageServer) -> None:
    evil = '<img src=x onerror="window.ran=1"><script>window.ran=2</script> [a](javascript:window.ran=3)'
    name = '<b onclick="window.ran=4">'
    page.answers.append(
        [
            chunk(reasoning_content=evil),
            *said(f"{evil}\n\n# {evil}\n\n- {evil}\n\n`{evil}` **{evil}**\n\n```{evil}\n{evil}\n```")[:-3],
            call(0, name, json.dumps({"x": evil}), "abc"),
            chunk(finish="tool_calls"),
            "[DONE]",
        ]
    )
    ask(window, evil)
    window.shows(".told .tools", "waits for results")
    assert window.all(".asked *, .told img, .told script, .told a, .told b b") == []
    assert window.run("return window.ran ?? 0") == 0
    assert window.text(".told").count("onerror=") == 7, (
        "all are there to be read, but for the thoughts, which are folded"
    )
    assert window.text(".call h3 b") == name


MARKED = """# Title
Some *stressed* and **strong** `code` words,
in two lines.
1. one
2. two
  - deeper
  goes on

```python
def f():

    return "*not stressed*"
```
Not a list: 2*3*4 and a_b_c."""


def test_blocks_of_a_text_are_told_apart(window: Browser, page: PageServer) -> None:
    page.answers.append([*(chunk(content=letter) for letter in MARKED), *said("")[-3:]])
    ask(window, "Show")
    window.shows(".told .tools", "Copy")
    body = window.one(".told .text")
    children = body.find_elements(By.XPATH, "./*")
    assert [child.tag_name for child in children] == ["h3", "p", "ol", "pre", "p"]
    assert [found.text for found in body.find_elements(By.CSS_SELECTOR, "em, strong, p code")] == [
        "stressed",
        "strong",
        "code",
    ]
    items = body.find_elements(By.TAG_NAME, "li")
    assert [item.get_property("textContent") for item in items] == ["one", "two", "deeper\ngoes on"]
    assert [item.get_attribute("data-depth") for item in items] == ["0", "0", "1"]
    assert children[3].get_property("textContent") == 'def f():\n\n    return "*not stressed*"'
    assert children[4].text == "Not a list: 2*3*4 and a_b_c."


@pytest.mark.parametrize("mark", ["`", "*", "**a ", "*a", "`a``b", "- ", "# ", "1. ", "~~~\n", "` `` ``` "])
def test_a_model_that_repeats_itself_holds_nothing_up(window: Browser, page: PageServer, mark: str) -> None:
    """Time grows with the length; were it with its square or cube, the shorter text alone would take seconds."""
    script = """
        const { show } = await import("/page/text.js");
        const began = performance.now();
        show(document.createElement("div"), "x " + given[0]);
        return performance.now() - began;
    """
    for length in (1_500, 20_000):
        assert window.run(script, mark * (length // len(mark))) < 500


def test_calls_are_shown_and_their_results_sent(window: Browser, page: PageServer) -> None:
    arguments = '{"place":"Zaragoza"}'
    pieces: list[Event] = [
        chunk(content="I look."),
        call(0, "weather", arguments[:9], "call-a"),
        call(0, arguments=arguments[9:]),
        call(1, "time", "{}", "call-b"),
        chunk(finish="tool_calls"),
        "[DONE]",
    ]
    page.answers += [pieces, said("Windy.")]
    ask(window, "How windy?")
    window.shows(".told .tools", "Send results")
    heads = [element.text for element in window.all(".call h3")]
    assert heads == ["calls weather", "calls time"]
    assert window.text(".call pre").split("\n{}")[0] == '{\n  "place": "Zaragoza"\n}'
    fields = window.all(".call textarea")
    window.until(lambda: window.driver.switch_to.active_element == fields[0])
    fields[0].send_keys("80 km/h")
    fields[1].send_keys("noon")
    window.one(".told .tools button:first-child").click()
    window.shows(".told:last-child .text", "Windy.")
    called = {"id": "call-a", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    other = {"id": "call-b", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    assert page.asked[1]["messages"][1:] == [
        {"role": "assistant", "content": "I look.", "tool_calls": [called, other]},
        {"role": "tool", "tool_call_id": "call-a", "content": "80 km/h"},
        {"role": "tool", "tool_call_id": "call-b", "content": "noon"},
    ]


def test_a_question_instead_of_results_brings_what_was_typed(window: Browser, page: PageServer) -> None:
    """Each call must have its result before the conversation goes on."""
    page.answers += [[call(0, "weather", "{}", "call-a"), chunk(finish="tool_calls"), "[DONE]"], said("Well.")]
    ask(window, "How windy?")
    window.shows(".told .tools", "Send result")
    ask(window, "Never mind.")
    window.shows(".told:last-child .text", "Well.")
    assert [turn["role"] for turn in page.asked[1]["messages"]] == ["user", "assistant", "tool", "user"]


@pytest.mark.parametrize("by", ["button", "key"])
def test_stopping_cancels_and_keeps_what_came(window: Browser, page: PageServer, by: str) -> None:
    never = threading.Event()
    page.answers += [[chunk(content="Half"), never], said("More.")]
    ask(window, "Go")
    window.shows(".told .text", "Half")
    if by == "button":
        window.one("#stop").click()
    else:
        window.one("#question").send_keys(Keys.ESCAPE)
    window.shows(".told .tools", "stopped")
    assert page.gone.wait(10), "the stream is closed"
    assert window.driver.switch_to.active_element == window.one("#question")
    ask(window, "Go on")
    window.shows(".told:last-child .text", "More.")
    assert page.asked[1]["messages"][1] == {"role": "assistant", "content": "Half"}


def test_another_chat_ends_the_one_that_runs(window: Browser, page: PageServer) -> None:
    never = threading.Event()
    page.answers += [[chunk(content="Half"), never], said("New.")]
    ask(window, "Go")
    window.shows(".told .text", "Half")
    window.one("#new").click()
    assert page.gone.wait(10)
    ask(window, "Again")
    window.shows(".told .text", "New.")
    window.shows(".told .tools", "tokens")
    assert len(page.asked[1]["messages"]) == 1
    assert "Half" not in window.text("#turns")


def test_an_error_in_the_stream_is_told(window: Browser, page: PageServer) -> None:
    failed = {"error": {"message": "the deadline has passed", "type": "deadline"}}
    page.answers.append([chunk(content="Half"), failed])
    ask(window, "Go")
    window.shows(".told .wrong", "the deadline has passed")
    assert window.text(".told .text") == "Half"
    assert window.one("#send").is_displayed()
    assert window.one("#spoken").get_property("textContent") == "the deadline has passed"


def test_a_stream_that_only_stops_is_not_taken_for_whole(window: Browser, page: PageServer) -> None:
    page.answers.append([chunk(content="Half"), chunk(finish="stop")])
    ask(window, "Go")
    window.shows(".told .wrong", "broke off")


def test_a_stream_may_be_cut_anywhere(window: Browser, page: PageServer) -> None:
    """In the middle of an event, of a character and of a line's end; with comments, and an event in two lines."""
    body = ": a comment\r\n\r\ndata:one \N{HIRAGANA LETTER A}\ndata: two\n\n"
    body += "event: x\rdata: three\r\rdata: [DONE]\r\n\r\n"
    script = """
        const { events } = await import("/page/door.js");
        const found = [];
        const start = (controller) => {
          for (let at = 0; at < given[0].length; at += given[1]) {
            controller.enqueue(Uint8Array.from(given[0].slice(at, at + given[1])));
          }
          controller.close();
        };
        for await (const data of events(new Response(new ReadableStream({ start })))) found.push(data);
        return found;
    """
    for size in (1, 2, 3, 1000):
        found = window.run(script, [*body.encode()], size)
        assert found == ["one \N{HIRAGANA LETTER A}\ntwo", "three", "[DONE]"]


def test_a_refusal_is_told_and_can_be_tried_again(window: Browser, page: PageServer) -> None:
    refused = JSONResponse({"error": {"message": "too many requests"}}, 429, headers={"retry-after": "3"})
    page.answers += [refused, said("Now.")]
    ask(window, "Go")
    window.shows(".told .wrong", "too many requests (Try again in 3 s.)")
    window.one(".told .tools button").click()
    window.shows(".told .text", "Now.")
    assert page.asked[0] == page.asked[1]
    assert len(window.all(".told")) == 1


def test_a_question_ends_the_offer_to_try_the_one_before_again(window: Browser, page: PageServer) -> None:
    """Two answers at once could not be stopped both, and the turns of one would be lost."""
    rest = threading.Event()
    page.answers += [JSONResponse({"error": {"message": "no"}}, 503), [chunk(content="Two"), rest, *said(".")]]
    ask(window, "First?")
    window.shows(".told", "Try again")
    ask(window, "Second?")
    window.shows(".told:last-child .text", "Two")
    assert "Try again" not in window.text("#turns")
    rest.set()
    window.shows(".told:last-child .text", "Two.")
    assert len(page.asked) == 2


def test_an_answer_of_somebody_else_is_told_by_its_status(window: Browser, page: PageServer) -> None:
    page.answers.append(JSONResponse("bad gateway", 502))
    ask(window, "Go")
    window.shows(".told .wrong", "status 502")


def test_lines_are_begun_by_shift_and_enter(window: Browser, page: PageServer) -> None:
    page.answers.append(said("Two lines."))
    window.one("#question").send_keys("one", Keys.SHIFT, Keys.ENTER, Keys.NULL, "two")
    assert not page.asked
    ask(window, "")
    window.shows(".told .text", "Two lines.")
    assert page.asked[0]["messages"][0]["content"] == "one\ntwo"


def test_nothing_is_sent_for_nothing(window: Browser, page: PageServer) -> None:
    ask(window, "  ")
    page.answers.append(said("Something."))
    ask(window, "x")
    window.shows(".told .text", "Something.")
    assert len(page.asked) == 1


def test_the_end_stays_in_sight_unless_somebody_scrolls(window: Browser, page: PageServer) -> None:
    more, rest = threading.Event(), threading.Event()
    lines = [chunk(content=f"line {number}\n\n") for number in range(80)]
    page.answers.append([*lines, more, *lines, chunk(content="the middle"), rest, *lines, *said("the end")])
    ask(window, "Go")
    window.shows(".told .text", "line 79")
    below = "const t = document.getElementById('talk'); return t.scrollHeight - t.scrollTop - t.clientHeight"
    window.until(lambda: window.run(below) < 10)
    more.set()
    window.shows(".told .text", "the middle")
    window.until(lambda: window.run(below) < 10)
    window.run("document.getElementById('talk').scrollTop = 0")
    rest.set()
    window.shows(".told .text", "the end")
    assert window.run("return document.getElementById('talk').scrollTop") == 0


def test_the_answer_is_copied_as_it_was_written(window: Browser, page: PageServer) -> None:
    window.driver.set_permissions("clipboard-read", "granted")
    page.answers.append(said("Some **strong** words."))
    ask(window, "Go")
    window.shows(".told .tools", "Copy")
    window.one(".told .tools button").click()
    window.shows(".told .tools", "Copied")
    assert window.run("return await navigator.clipboard.readText()") == "Some **strong** words."


def test_a_key_is_sent_with_questions(window: Browser, page: PageServer) -> None:
    page.key = "a-secret"
    window.shows("#notes", "asks for a key")
    page.answers.append(said("Yes."))
    ask(window, "May I?")
    window.shows(".told .wrong", "a key is needed")
    window.one("#key-box summary").click()
    window.one("#key").send_keys("a-secret", Keys.ENTER)
    window.shows("#state", "ready")
    window.one(".told .tools button").click()
    window.shows(".told .text", "Yes.")


def test_a_phone_chats_too(window: Browser, page: PageServer) -> None:
    window.open(page.url, PHONE)
    window.shows("#state", "ready")
    page.answers.append(said("Yes, " + "w" * 300))
    ask(window, "Long words?")
    window.shows(".told .text", "Yes")
    window.shows(".told .tools", "tokens")
    assert window.run("return document.documentElement.scrollWidth") == PHONE[0]
    send, form = window.one("#send").rect, window.one("#ask").rect
    assert form["y"] + form["height"] <= PHONE[1]
    assert send["y"] < form["y"] + form["height"]

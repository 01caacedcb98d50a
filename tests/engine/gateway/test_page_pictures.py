"""Pictures in the page's chat box, in a browser."""

from __future__ import annotations

import base64
from pathlib import Path

from browser import Browser
from image_files import picture
from page_server import PageServer, ask, figures, said


def test_pictures_go_with_the_question(window: Browser, page: PageServer, tmp_path: Path) -> None:
    page.answers += [said("A cat."), said("Yes.")]
    file, other = tmp_path / "cat.png", tmp_path / "notes.txt"
    file.write_bytes(picture(40, 30))
    other.write_text("a")
    window.one("#pictures").send_keys(f"{file}\n{other}")
    window.shows("#pictures-wrong", "notes.txt is no PNG, JPEG, WebP or GIF.")
    window.one("#pictures").send_keys(str(file))
    window.until(lambda: len(window.all("#chosen img")) == 2)
    window.one("#chosen button").click()  # one of the two is enough
    window.until(lambda: len(window.all("#chosen img")) == 1)
    ask(window, "What is it?")
    window.shows(".told .text", "A cat.")
    url = f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
    turn = {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}],
    }
    assert page.asked[0]["messages"] == [turn]
    assert window.one(".asked img").get_attribute("naturalWidth") == "40"
    assert not window.all("#chosen img")
    ask(window, "Sure?")
    window.shows(".told:last-child .text", "Yes.")
    assert page.asked[1]["messages"][0] == turn
    assert page.asked[1]["messages"][2] == {"role": "user", "content": "Sure?"}


def test_a_picture_is_dropped_or_pasted(window: Browser, page: PageServer) -> None:
    page.answers.append(said("Two."))
    window.run(
        "const data = new DataTransfer(); data.items.add(new File([new Uint8Array(given[0])], 'a.png', "
        "{type: 'image/png'}));"
        "document.getElementById('question').dispatchEvent(new ClipboardEvent('paste', {clipboardData: data, "
        "bubbles: true, cancelable: true}));"
        "document.getElementById('ask').dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true, "
        "cancelable: true}));",
        [*picture(9, 9)],
    )
    window.until(lambda: len(window.all("#chosen img")) == 2)
    ask(window, "How many?")
    window.shows(".told .text", "Two.")
    assert [part["type"] for part in page.asked[0]["messages"][0]["content"]] == ["image_url", "image_url", "text"]


def test_a_model_of_text_is_offered_no_pictures(window: Browser, page: PageServer) -> None:
    window.until(lambda: window.one("#add").is_displayed())
    page.state = figures(sees=False)
    window.until(lambda: not window.one("#add").is_displayed())

"""`LLM` with images: which requests they make, and what is refused before anything runs."""

from __future__ import annotations

import msgspec
import pytest
from image_files import IMG, VISION, picture
from tekken_folders import tekken, write_tekken

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.llm import LLM
from cierzo.engine.text.image_tokens import grid_of, tokens_of
from cierzo.engine.weights.make import make_checkpoint

FILES = [picture(60, 90, seed=1), picture(20, 20, "JPEG")]
TOKENS = [tokens_of(grid_of(*size, VISION), VISION) for size in ((60, 90), (20, 20))]
PARTS = [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image"}]
TURN = {"role": "user", "content": PARTS}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """A model of text that is taken for one which sees, and gives its requests instead of running them."""
    folder = make_checkpoint(tmp_path_factory.mktemp("images") / "tiny", like="small3", dtype="float32")
    config = tekken("v15")["config"] | {"default_vocab_size": 256 + 64}
    bytes_alone = tekken("v15")["vocab"][:256]
    write_tekken(folder, vocab=bytes_alone, config=config)
    with LLM(folder, dtype="float32", max_model_len=1024, kv_cache_gib=0.05) as made:
        made._info = msgspec.structs.replace(made._info, vision=VISION)
        made._run = lambda jobs, progress: [job.submit for job in jobs]
        yield made


def places(submit):
    return [(image.offset, image.rows, image.columns) for image in submit.images]


def test_a_conversation_has_its_images_in_order(llm):
    submit = llm.chat([TURN], images=FILES)
    ids = submit.prompt_token_ids
    first = ids.index(IMG)
    assert ids[first : first + len(TOKENS[0])] == TOKENS[0]
    second = ids.index(IMG, first + len(TOKENS[0]))
    assert ids[second : second + len(TOKENS[1])] == TOKENS[1]
    assert places(submit) == [(first, 4, 3), (second, 1, 1)]
    assert [len(image.pixels) for image in submit.images] == [12 * 28 * 28 * 12, 28 * 28 * 12]
    (alone,) = (llm.chat({"role": "user", "content": PARTS[:1]}, images=FILES[1]),)
    assert alone.images[0].digest == submit.images[1].digest


def test_token_ids_have_the_tokens_of_their_images(llm):
    both = [1, *TOKENS[0], 70, *TOKENS[1]]
    (submit,) = llm.generate(both, images=FILES)
    assert places(submit) == [(1, 4, 3), (2 + len(TOKENS[0]), 1, 1)]
    one, none, other = llm.generate([TOKENS[0], [1, 70], both], images=[FILES[:1], [], FILES])
    assert [len(submit.images) for submit in (one, none, other)] == [1, 0, 2]
    assert one.images[0].digest == submit.images[0].digest


@pytest.mark.parametrize(
    ("ask", "field"),
    [
        (lambda llm: llm.chat([TURN], images=FILES[:1]), "messages[0].content[2]"),
        (lambda llm: llm.chat([TURN], images=[*FILES, FILES[0]]), "images[2]"),
        (lambda llm: llm.chat([TURN], images=[FILES[0], b"none"]), "messages[0].content[2]"),
        (lambda llm: llm.chat([TURN], images="cat.png"), "images"),
        (lambda llm: llm.generate("a", images=FILES), "images"),
        (lambda llm: llm.generate([TOKENS[0]], images=[FILES]), "token_ids"),
        (lambda llm: llm.generate([TOKENS[0]]), "token_ids"),
        (lambda llm: llm.generate([[1], [2]], images=FILES[:1]), "images"),
    ],
)
def test_what_does_not_fit_is_refused(llm, ask, field):
    with pytest.raises(InvalidRequest) as error:
        ask(llm)
    assert error.value.field == field


def test_a_model_of_text_takes_none(llm, monkeypatch):
    monkeypatch.setattr(llm, "_info", msgspec.structs.replace(llm._info, vision=None))
    with pytest.raises(InvalidRequest, match="text alone"):
        llm.chat([TURN], images=FILES)

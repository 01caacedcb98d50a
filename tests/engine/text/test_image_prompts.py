"""Prompts with images: mistral-common's token ids, and those of chat templates that write images."""

import base64
import json
import random

import numpy as np
import pytest
from image_files import BREAK, END, IMG, VISION, picture
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tekken_folders import write_tekken
from tokenizers import AddedToken
from word_folders import ROLES, byte_level

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.messages import ChatMessage, Generate, ImageChunk, TextChunk, ToolCall
from cierzo.engine.text.image_tokens import Grid, Images, Prepared, tokens_of
from cierzo.engine.text.images import ImageLimits, prepare
from cierzo.engine.text.prompt import PromptEncoder

LIMITS = ImageLimits(max_images=64, max_image_bytes=1 << 20, max_image_pixels=1_000_000, max_image_tokens=100_000)
TEMPLATE = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'assistant' %}{{ m.content }}{{ eos_token }}
{%- else %}[INST]{% if m.content is string %}{{ m.content }}{% else %}
{%- for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}[IMG]{% endif %}{% endfor %}
{%- endif %}[/INST]{% endif %}{% endfor %}"""
USER = ChatMessage(role="user", content=[TextChunk(text="What is "), ImageChunk(), TextChunk(text="?")])


def stub(*grids):
    return Images([Prepared(Grid(*grid), bytes([number]) * 16, b"") for number, grid in enumerate(grids)], VISION)


def data_url(file):
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


def conversation(rng, *, results):
    """Turns of ours and of mistral-common's, with images first, last, between, alone, and in several turns."""
    ours, theirs, files = [], [], []

    def content(most):
        mine, other = [], []
        for _ in range(rng.randrange(1, most)):
            if rng.random() < 0.5:
                files.append(picture(rng.randrange(1, 200), rng.randrange(1, 200), seed=rng.randrange(99)))
                mine.append(ImageChunk())
                other.append({"type": "image_url", "image_url": {"url": data_url(files[-1])}})
            else:
                text = rng.choice(["hola ", "what is this?", "x", "[IMG]", "a\nb"])
                mine.append(TextChunk(text=text))
                other.append({"type": "text", "text": text})
        return mine, other

    def add(role, mine, other, **more):
        ours.append(ChatMessage(role=role, content=mine, **more))
        theirs.append({"role": role, "content": other, **more})

    if rng.random() < 0.3:
        add("system", "Be brief.", "Be brief.")
    for _ in range(rng.randrange(1, 4)):
        add("user", *content(6))
        if rng.random() < 0.3:
            add("user", *content(3))
        if results and rng.random() < 0.5:
            ids = [f"callcall{letter}" for letter in "abc"[: rng.randrange(1, 4)]]
            ours.append(
                ChatMessage(
                    role="assistant", tool_calls=[ToolCall(name="f", arguments="{}", id=each) for each in ids]
                )
            )
            function = {"name": "f", "arguments": "{}"}
            theirs.append({"role": "assistant", "tool_calls": [{"id": each, "function": function} for each in ids]})
            for each in rng.sample(ids, len(ids)):
                add("tool", *content(3), tool_call_id=each)
        add("assistant", "I see.", "I see.")
    ours.pop()
    theirs.pop()
    return ours, theirs, files


@pytest.mark.parametrize("version", ["v13", "v15"])
def test_ids_and_pixels_are_mistral_common_s(version, tmp_path):
    folder = write_tekken(tmp_path, version)
    theirs, ours = MistralTokenizer.from_file(str(folder / "tekken.json")), PromptEncoder.load(folder)
    rng = random.Random(version)
    for _ in range(25):
        mine, other, files = conversation(rng, results=version == "v15")
        fields = [f"images[{number}]" for number in range(len(files))]
        images = Images(prepare(files, fields, VISION, LIMITS), VISION)
        prompt = ours.encode(Generate(stream=0, messages=mine), None, images)
        expected = theirs.encode_chat_completion(ChatCompletionRequest(messages=other))
        assert prompt.token_ids == expected.tokens
        assert len(prompt.images) == len(expected.images) == len(files)
        for image, pixels in zip(prompt.images, expected.images, strict=True):
            grid = Grid(image.rows, image.columns)
            place = slice(image.offset, image.offset + grid.num_tokens)
            assert prompt.token_ids[place] == tokens_of(grid, VISION)
            found = np.frombuffer(image.pixels, "<f4").reshape(grid.rows * 28, grid.columns * 28, 3)
            assert np.abs(found.transpose(2, 0, 1) - pixels).max() < 1e-3


def test_an_image_behind_texts_alone_comes_first_and_results_come_in_the_order_of_their_calls(tmp_path):
    prompts = PromptEncoder.load(write_tekken(tmp_path))
    calls = [ToolCall(name="f", arguments="{}", id=each) for each in ("aaaaaaaaa", "bbbbbbbbb")]
    turns = [
        ChatMessage(role="user", content=[TextChunk(text="see"), ImageChunk()]),
        ChatMessage(role="assistant", tool_calls=calls),
        ChatMessage(role="tool", content=[ImageChunk()], tool_call_id="bbbbbbbbb"),
        ChatMessage(role="tool", content=[ImageChunk()], tool_call_id="aaaaaaaaa"),
    ]
    prompt = prompts.encode(Generate(stream=0, messages=turns), None, stub((1, 1), (1, 2), (1, 3)))
    assert [image.columns for image in prompt.images] == [1, 3, 2]
    assert [image.digest[0] for image in prompt.images] == [0, 2, 1]
    first = prompt.images[0].offset
    assert prompt.token_ids[first - 1 : first + 2] == [3, IMG, END]


@pytest.mark.parametrize(
    ("version", "turn", "limit"),
    [
        ("v15", ChatMessage(role="system", content=[ImageChunk()]), "in turns of: user, tool"),
        ("v13", ChatMessage(role="assistant", content=[ImageChunk()], prefix=True), "in turns of: user"),
    ],
)
def test_mistral_s_tokenizers_write_images_in_turns_of_some_roles(version, turn, limit, tmp_path):
    turns = [ChatMessage(role="user", content="a"), turn] if turn.role == "assistant" else [turn]
    with pytest.raises(InvalidRequest) as error:
        PromptEncoder.load(write_tekken(tmp_path, version)).encode(
            Generate(stream=0, messages=turns), None, stub((1, 1))
        )
    assert (error.value.field, error.value.limit) == (f"messages[{len(turns) - 1}].content[0]", limit)


# --- chat templates ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template")
    inner = byte_level()
    inner.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in WORDS])
    inner.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **ROLES}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return PromptEncoder.load(folder)


WORDS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")


def of_template(prompts, *grids):
    import msgspec

    ids = [prompts.special_ids[word] for word in WORDS]
    vision = msgspec.structs.replace(VISION, image_token_id=ids[0], break_token_id=ids[1], end_token_id=ids[2])
    return Images([Prepared(Grid(*grid), bytes(16), b"") for grid in grids], vision), ids


def test_what_a_template_writes_for_an_image_becomes_all_of_its_tokens(template):
    images, (img, brk, end) = of_template(template, (2, 3), (1, 1))
    turns = [
        USER,
        ChatMessage(role="assistant", content="A cat."),
        ChatMessage(role="user", content=[ImageChunk()]),
    ]
    prompt = template.encode(Generate(stream=0, messages=turns), None, images)
    rows = [img, img, img, brk, img, img, img, end]
    spell, begin, close = (
        template.tokenizer.encode_piece,
        *(template.special_ids[each] for each in ("[INST]", "[/INST]")),
    )
    assert prompt.token_ids == [
        *(template.special_ids["<s>"], begin, *spell("What is "), *rows, *spell("?"), close),
        *(*spell("A cat."), template.special_ids["</s>"], begin, img, end, close),
    ]
    assert [(image.offset, image.rows, image.columns) for image in prompt.images] == [
        (prompt.token_ids.index(img), 2, 3),
        (len(prompt.token_ids) - 3, 1, 1),
    ]
    assert template.template.writes_images


def test_a_client_spells_no_image_in_its_text(template):
    images, (img, *_) = of_template(template, (1, 1))
    parts = [TextChunk(text="[IM"), TextChunk(text="G][IMG]"), ImageChunk(), TextChunk(text="[IMG]")]
    turns = [ChatMessage(role="user", content=parts)]
    assert template.encode(Generate(stream=0, messages=turns), None, images).token_ids.count(img) == 1


def test_a_template_that_writes_no_images_refuses_them():
    from word_folders import ours

    images, _ = stub((1, 1)), None
    assert not ours("bytes", "ChatML").template.writes_images
    with pytest.raises(InvalidRequest) as error:
        ours("bytes", "ChatML").encode(Generate(stream=0, messages=[USER]), None, images)
    assert (error.value.field, error.value.value) == ("messages", "0")


# --- token ids ---------------------------------------------------------------------------------------------


def test_tokens_of_images_may_stand_in_token_ids_if_the_images_come_with_them():
    ids = [7, IMG, IMG, BREAK, IMG, IMG, END, 8, IMG, END]
    prompt = PromptEncoder().encode(Generate(stream=0, token_ids=ids), None, stub((2, 2), (1, 1)))
    assert [(image.offset, image.rows, image.columns) for image in prompt.images] == [(1, 2, 2), (8, 1, 1)]


@pytest.mark.parametrize(
    ("ids", "value"),
    [
        ([7, IMG, IMG, BREAK, IMG, IMG, BREAK, 8, IMG, END], "1"),
        ([IMG, END, IMG, IMG, BREAK, IMG, IMG, END], "0"),
        ([IMG, IMG, BREAK, IMG, IMG, END], "6"),
        ([], "0"),
        ([IMG, IMG, BREAK, IMG, IMG, END, IMG, END, 5, IMG], str(IMG)),
    ],
)
def test_token_ids_that_have_not_the_tokens_of_the_images_are_refused(ids, value):
    with pytest.raises(InvalidRequest) as error:
        PromptEncoder().encode(Generate(stream=0, token_ids=ids), None, stub((2, 2), (1, 1)))
    assert (error.value.field, error.value.value) == ("token_ids", value)

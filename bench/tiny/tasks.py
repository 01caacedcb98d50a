"""Tasks with checkable answers, drawn at random: what the tiny model is trained on, and asked by tests.

An instance is held out if a digest of it says so: HELD_OUT of ten thousand are never trained on.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageDraw

HELD_OUT = 500  # of 10,000 instances
DIGIT_DOTS = 5  # of a row; it has seven rows
DOT_PX, CELL_PX = 4, 28  # of a dot, and of the squares of an image, one of which holds the digit
COLOURS = {
    "red": (210, 30, 30),
    "green": (20, 140, 40),
    "blue": (30, 60, 210),
    "orange": (240, 140, 0),
    "purple": (130, 30, 160),
    "black": (10, 10, 10),
}
_DOTS = (
    "01110100011001110101110011000101110", "00100011000010000100001000010001110",
    "01110100010000100110010001000011111", "11111000100010000010000011000101110",
    "00010001100101010010111110001000010", "11111100001111000001000011000101110",
    "00110010001000011110100011000101110", "11111000010001000100010000100001000",
    "01110100011000101110100011000101110", "01110100011000101111000010001001100",
)  # fmt: skip
WORDS = (
    "apple", "river", "stone", "cloud", "tiger", "lemon", "piano", "green", "house", "candle", "winter",
    "bridge", "paper", "silver", "ocean", "garden", "window", "rabbit", "purple", "engine", "flower", "mirror",
    "button", "castle", "forest", "island", "jacket", "kettle", "ladder", "magnet", "needle", "orange",
    "pepper", "rocket", "saddle", "temple", "violin", "wagon", "yellow", "zebra", "anchor", "basket", "copper",
    "dragon", "eagle", "feather",
)  # fmt: skip
NAMES = (
    "Ana", "Ben", "Carla", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Louis",
    "Marta", "Nils", "Olga", "Pedro",
)  # fmt: skip
CITIES = (
    "Paris", "Rome", "Madrid", "Oslo", "Berlin", "Vienna", "Lisbon", "Athens", "Dublin", "Prague", "Warsaw",
    "Geneva", "Naples", "Porto",
)  # fmt: skip
# Tools by name: what they do, their one argument, and how they are asked for.
TOOLS: dict[str, tuple[str, str, str]] = {
    "get_weather": ("Weather of a city", "city", "What is the weather in {}?"),
    "get_time": ("Local time of a city", "city", "What time is it in {}?"),
    "find_hotel": ("Hotels of a city", "city", "Find a hotel in {}."),
    "call_person": ("Call somebody", "name", "Call {} for me."),
    "send_mail": ("Write to somebody", "name", "Send a mail to {}."),
    "play_song": ("Play a song", "title", "Play the song {}."),
}


@dataclass(frozen=True, slots=True)
class Instance:
    """A question and its one right answer.

    An image comes before the question. thinking: what comes before the answer at effort "high". call: name and
    arguments of the tool that is the answer.
    """

    task: str
    question: str
    answer: str
    effort: str = "none"
    thinking: str = ""
    call: tuple[str, dict[str, Any]] | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    image: Image.Image | None = None

    @property
    def is_held_out(self) -> bool:
        """Whether it is kept from training."""
        said = f"{self.task} {self.question} {self.answer} {self.call}".encode()
        said += b"" if self.image is None else self.image.tobytes()
        return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest()) % 10_000 < HELD_OUT


def copying(draw: random.Random) -> Instance:
    """Up to 16 words that are repeated, or one that is found again, by its owner, among up to 8; few words are the
    likelier, since copying is learned with them."""
    if draw.random() < 0.5:
        text = " ".join(draw.sample(WORDS, few(draw, 16)))
        return Instance("copying", f"Repeat: {text}", text)
    names, words = draw.sample(NAMES, count := few(draw, 8)), draw.sample(WORDS, count)
    listed, at = ", ".join(f"{name} {word}" for name, word in zip(names, words, strict=True)), draw.randrange(count)
    return Instance("copying", f"{listed}. What has {names[at]}?", f"{names[at]} {words[at]}")


def few(draw: random.Random, most: int) -> int:
    """From 2 to `most`, mostly few."""
    return draw.randint(2, draw.randint(2, most))


def arithmetic(draw: random.Random) -> Instance:
    """Sums below a hundred and differences of a number from 10 on and a second one: below ten, or, at effort "high"
    alone, where they are thought through, up to 89."""
    effort = draw.choice(("none", "high"))
    least, most = draw.choice(((1, 9), (10, 89), (10, 89))) if effort == "high" else (1, 9)
    if draw.random() < 0.5:
        other = draw.randint(least, most)
        one = draw.randint(10, 99 - other)
        question, answer = f"{one} + {other}", str(one + other)
        ones = one % 10 + other % 10
        steps = f"{one % 10} + {other % 10} = {ones}. "
        steps += f"{one // 10} + {other // 10} + {ones // 10} = {(one + other) // 10}"
    else:
        other = draw.randint(least, most)
        one = draw.randint(max(10, other), 99)
        question, answer = f"{one} - {other}", str(one - other)
        borrowed = one % 10 < other % 10
        steps = f"{one % 10 + 10 * borrowed} - {other % 10} = {(one - other) % 10}. "
        steps += f"{one // 10 - borrowed} - {other // 10} = {(one - other) // 10}"
    return Instance("arithmetic", f"{question} =", answer, effort, steps if effort == "high" else "")


def description(draw: random.Random) -> Instance:
    """A person as JSON."""
    name, age, city = draw.choice(NAMES), draw.randint(10, 99), draw.choice(CITIES)
    forms = ("{0} is {1} and lives in {2}.", "{0} lives in {2} and is {1}.", "In {2} lives {0}, who is {1}.")
    question = "As JSON: " + draw.choice(forms).format(name, age, city)
    return Instance("json", question, json.dumps({"name": name, "age": age, "city": city}))


def calling(draw: random.Random) -> Instance:
    """A call of the listed tool that does what is asked for."""
    names = draw.sample(sorted(TOOLS), draw.randint(1, 2))
    name = draw.choice(names)
    _, argument, form = TOOLS[name]
    value = draw.choice({"city": CITIES, "name": NAMES, "title": WORDS}[argument])
    tools = [tool(one) for one in names]
    return Instance("tools", form.format(value), "", call=(name, {argument: value}), tools=tools)


def tool(name: str) -> dict[str, Any]:
    """Write one of TOOLS as a request lists it."""
    what, argument, _ = TOOLS[name]
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}}
    return {"name": name, "description": what, "parameters": parameters}


def seeing(draw: random.Random) -> Instance:
    """A digit in an image, its colour, or both."""
    digit, colour = draw.randrange(10), draw.choice(sorted(COLOURS))
    size = draw.choice((56, 84)), draw.choice((56, 84))
    question, answer = draw.choice(
        (("Which digit?", f"{digit}"), ("Which colour?", colour), ("Which colour and digit?", f"{colour} {digit}"))
    )
    return Instance("images", question, answer, image=picture(draw, digit, colour, size))


def picture(draw: random.Random, digit: int, colour: str, size: tuple[int, int]) -> Image.Image:
    """An image of one digit, in one square of a light ground. size: columns and rows, in pixels."""
    shades = [draw.randint(200, 255) for _ in range(3)]
    image = Image.new("RGB", size, (shades[0], shades[1], shades[2]))
    fill = tuple(max(0, min(255, value + draw.randint(-15, 15))) for value in COLOURS[colour])
    left, top = (draw.randrange(side // CELL_PX) * CELL_PX for side in size)
    pen = ImageDraw.Draw(image)
    for index, is_set in enumerate(_DOTS[digit]):
        if is_set == "1":
            x, y = left + (1 + index % DIGIT_DOTS) * DOT_PX, top + index // DIGIT_DOTS * DOT_PX
            pen.rectangle((x, y, x + DOT_PX - 1, y + DOT_PX - 1), fill=fill)
    return image


TASKS: dict[str, Callable[[random.Random], Instance]] = {
    "copying": copying,
    "arithmetic": arithmetic,
    "json": description,
    "tools": calling,
    "images": seeing,
}


def drawn(task: str, draw: random.Random, *, held_out: bool) -> Instance:
    """An instance of a task, for training or held out."""
    while (one := TASKS[task](draw)).is_held_out != held_out:
        pass
    return one

"""Files of images: what becomes of them, and what is refused before and while they are decoded."""

import contextlib
import io
import random
import tracemalloc
import zlib
from hashlib import blake2b
from typing import get_type_hints

import image_files
import numpy as np
import pytest
from image_files import BREAK, END, IMG, VISION, animated, bomb, chunk, file_of, noise, picture, png
from PIL import Image, ImageOps

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.text import images
from cierzo.engine.text.image_tokens import MEAN, STD, Grid, grid_of, tokens_of
from cierzo.engine.text.images import FORMATS, ImageLimits, prepare, resized

LIMITS = ImageLimits(max_images=4, max_image_bytes=1 << 20, max_image_pixels=1_000_000, max_image_tokens=4000)
FIELD = "messages[0].content[1]"


def prepared(file, limits=LIMITS):
    (image,) = prepare([file], [FIELD], VISION, limits)
    return image


def rgb(file):
    """The pixels of a file as the tower gets them, in 0 to 255."""
    image = prepared(file)
    shape = (image.grid.rows * 28, image.grid.columns * 28, 3)
    pixels = np.frombuffer(image.pixels, "<f4").reshape(shape)
    return (pixels * np.asarray(STD, np.float32) + np.asarray(MEAN, np.float32)) * 255


def refused(file, limits=LIMITS):
    with pytest.raises(InvalidRequest) as error:
        prepared(file, limits)
    assert error.value.field == FIELD
    assert error.value.limit
    assert error.value.value
    assert error.value.message.startswith(FIELD)
    return error.value


@pytest.mark.parametrize(
    ("width", "height", "columns", "rows", "num_tokens"),
    [
        (100, 100, 4, 4, 20),
        (640, 480, 23, 18, 432),
        (1024, 1024, 37, 37, 1406),
        (1920, 1080, 55, 31, 1736),
        (3000, 2000, 55, 37, 2072),
        (1540, 1540, 55, 55, 3080),
        (28, 29, 1, 2, 4),
        (100_000, 1, 55, 1, 56),
        (1, 100_000, 1, 55, 110),
    ],
)
def test_the_grid_of_a_size(width, height, columns, rows, num_tokens):
    grid = grid_of(width, height, VISION)
    assert (grid.columns, grid.rows, grid.num_tokens) == (columns, rows, num_tokens)


def test_the_tokens_of_an_image_are_rows_with_a_break_and_at_last_an_end():
    assert tokens_of(Grid(rows=2, columns=3), VISION) == [IMG, IMG, IMG, BREAK, IMG, IMG, IMG, END]
    assert tokens_of(Grid(rows=1, columns=1), VISION) == [IMG, END]


def test_pixels_are_resized_and_normalised_and_the_digest_is_theirs():
    image = noise(70, 40)
    found = prepared(file_of(Image.fromarray(image)))
    assert found.grid == Grid(rows=2, columns=3)
    expected = (resized(image, 84, 56) / np.float32(255) - np.asarray(MEAN, np.float32)) / np.asarray(
        STD, np.float32
    )
    assert np.frombuffer(found.pixels, "<f4").tobytes() == expected.astype("<f4").tobytes()
    digest = blake2b(found.pixels, digest_size=16)
    digest.update(np.asarray([2, 3], "<u4").tobytes())
    assert found.digest == digest.digest()


def test_the_digest_tells_shapes_of_the_same_pixels_apart():
    white = [prepared(file_of(Image.new("RGB", size, "white"))) for size in ((56, 28), (28, 56), (56, 28))]
    assert white[0].pixels == white[1].pixels
    assert white[0].digest == white[2].digest != white[1].digest


@pytest.mark.parametrize("kind", FORMATS)
def test_the_format_is_told_by_the_content(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    found = rgb(file_of(Image.new("RGB", (28, 28), (250, 20, 30)), kind, **options))
    assert np.abs(found - [250, 20, 30]).max() < 3


def test_of_a_gif_the_first_frame_is_taken():
    assert np.abs(rgb(animated("GIF")) - [255, 0, 0]).max() < 2


def test_of_a_camera_s_jpeg_with_several_pictures_the_first_is_taken():
    first, other = Image.new("RGB", (28, 28), "red"), Image.new("RGB", (28, 28), "blue")
    file = file_of(first, "MPO", save_all=True, append_images=[other])
    assert np.abs(rgb(file) - [255, 0, 0]).max() < 3


def test_pillow_would_take_what_the_largest_limit_lets_pass():
    setting = get_type_hints(FrontendConfig, include_extras=True)["max_image_pixels"]
    (bound,) = (meta.le for meta in setting.__metadata__)
    assert bound < 2 * Image.MAX_IMAGE_PIXELS


COLOURS = [
    ("L", 100, (100, 100, 100)),
    ("1", 1, (255, 255, 255)),
    ("LA", (100, 255), (100, 100, 100)),
    ("LA", (0, 0), (255, 255, 255)),
    ("RGBA", (200, 0, 0, 255), (200, 0, 0)),
    ("RGBA", (200, 0, 0, 0), (255, 255, 255)),
    ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
]


@pytest.mark.parametrize(("mode", "colour", "expected"), COLOURS)
def test_grey_and_alpha_become_rgb_over_white(mode, colour, expected):
    assert np.abs(rgb(file_of(Image.new(mode, (28, 28), colour))) - expected).max() < 1


def test_a_palette_is_looked_up_and_what_it_says_is_transparent_is_white():
    image = Image.new("P", (56, 28), 0)
    image.putpalette([9, 8, 7, 200, 100, 50])
    image.paste(1, (28, 0, 56, 28))
    assert np.abs(rgb(file_of(image))[:, 40:] - [200, 100, 50]).max() < 1
    found = rgb(file_of(image, transparency=0))
    assert np.abs(found[:, :20] - 255).max() < 1
    assert np.abs(found[:, 40:] - [200, 100, 50]).max() < 1


def test_cmyk_becomes_rgb():
    image = Image.new("CMYK", (28, 28), (0, 255, 255, 0))
    expected = np.asarray(image.convert("RGB"))[0, 0]
    assert np.abs(rgb(file_of(image, "JPEG", quality=100)) - expected).max() < 4


def test_of_16_bits_the_upper_8_are_taken():
    deep = Image.fromarray(np.full((28, 28), 0x64FF, np.uint16))
    assert deep.mode == "I;16"
    assert np.abs(rgb(file_of(deep)) - 0x64).max() < 1


def test_16_bit_grey_that_is_transparent_is_white():
    row = b"\x00" + b"\x64\xff" * 14 + b"\x10\x00" * 14
    found = rgb(png(28, 28, row * 28, image_files.chunk(b"tRNS", b"\x64\xff"), depth=16))
    assert np.abs(found[:, :12] - 255).max() < 1
    assert np.abs(found[:, 16:] - 0x10).max() < 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_is_turned_as_its_exif_says(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    file = picture(84, 28, kind, exif=exif.tobytes(), **options)
    with Image.open(io.BytesIO(file)) as image:
        upright = ImageOps.exif_transpose(image)
    found = prepared(file)
    assert (found.grid.columns, found.grid.rows) == ((1, 3) if orientation > 4 else (3, 1))
    assert np.abs(rgb(file) - resized(np.asarray(upright.convert("RGB")), *upright.size)).max() < 0.01


def test_exif_that_is_broken_turns_nothing():
    file = picture(84, 28, "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff" + b"\xff" * 40)
    assert prepared(file).grid == Grid(rows=1, columns=3)


# --- limits ------------------------------------------------------------------------------------------------


def test_too_many_pixels_are_refused_before_they_are_decoded():
    file = bomb()
    assert len(file) < 20_000
    tracemalloc.start()
    error = refused(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert error.limit == "1000000 pixels"
    assert error.value == "144000000"
    assert "12000 x 12000" in error.message
    assert peak < 1_000_000


def test_a_jpeg_of_many_scans_is_refused_before_they_are_decoded():
    """Every scan may go through all pixels again: a hundred bytes of file take as long as the picture."""
    file = picture(64, 64, "JPEG", progressive=True)
    begin, end = file.rindex(b"\xff\xda"), file.rindex(b"\xff\xd9")
    usual = file.count(b"\xff\xda")
    most = file[:end] + file[begin:end] * (images.MAX_JPEG_SCANS - usual) + file[end:]
    assert 1 < usual < 20
    assert prepared(most).grid == prepared(file).grid
    error = refused(file[:end] + file[begin:end] * 500 + file[end:])
    assert (error.limit, error.value) == ("64 scans", str(usual + 500))


@pytest.mark.parametrize(("width", "height"), [(1_000_000, 1), (1, 1_000_000), (20_000, 50)])
def test_a_long_and_narrow_image_takes_little_memory(width, height):
    file = file_of(Image.new("1", (width, height), 1))
    assert len(file) < 3000
    tracemalloc.start()
    assert (rgb(file) > 254).all()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 16 * width * height + (32 << 20)


def test_a_limit_of_pixels_holds_exactly():
    limits = ImageLimits(4, 1 << 20, 40 * 30, 4000)
    assert prepared(picture(40, 30), limits)
    assert refused(picture(40, 31), limits).value == "1240"


def test_a_webp_that_announces_too_many_pixels_is_not_opened(monkeypatch):
    canvas = (16_000).to_bytes(3, "little")
    file = b"RIFF\x40\x00\x00\x00WEBPVP8X\x0a\x00\x00\x00" + bytes(4) + canvas + canvas + bytes(40)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("its decoder makes room for all pixels"))
    assert refused(file).limit == "1000000 pixels"


@pytest.mark.parametrize("lossless", [False, True])
def test_the_size_that_a_webp_tells_is_read_as_pillow_reads_it(lossless):
    file = picture(400, 300, "WEBP", lossless=lossless)
    assert refused(file, ImageLimits(4, 1 << 20, 119_999, 4000)).value == "120000"
    assert prepared(file, ImageLimits(4, 1 << 20, 120_000, 4000))


def test_a_frame_of_a_gif_may_not_be_larger_than_the_limit_either():
    refused(image_files.gif_beyond_its_screen())


def test_files_that_are_too_long_are_refused_unread():
    file = picture(40, 30) + bytes(1 << 20)
    assert refused(file).limit == "1048576 bytes"
    assert prepared(file[: 1 << 20])  # what stands behind an image is not looked at


def test_too_many_images_are_refused():
    with pytest.raises(InvalidRequest) as error:
        prepare([b""] * 5, [*"abcde"], VISION, LIMITS)
    assert (error.value.field, error.value.limit, error.value.value) == ("e", "4", "5")


@pytest.mark.parametrize(
    ("name", "num_chunks", "size"),
    [(b"zTXt", 1, 100 << 20), (b"iTXt", 1, 100 << 20), (b"iCCP", 1, 100 << 20), (b"zTXt", 80, 1 << 20)],
)
def test_texts_that_a_png_has_compressed_are_bounded(name, num_chunks, size):
    """A file of kilobytes with a hundred megabytes of text: of each chunk a megabyte is read, of all 64."""
    packed = zlib.compress(bytes(size), 9)
    head = b"a\0\1\0\0\0" if name == b"iTXt" else b"a\0\0"
    texts = [chunk(name, head + packed)] * num_chunks
    tracemalloc.start()
    try:
        error = refused(png(1, 1, b"\0\0", *texts))
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert "too" in error.message.lower()
    assert peak < 200 << 20


def test_too_many_tokens_of_all_images_are_refused_before_one_is_decoded(monkeypatch):
    files = [file_of(Image.new("L", (1000, 1000)))] * 4  # 36 rows of 36 and a break
    num_tokens = grid_of(1000, 1000, VISION).num_tokens
    assert len(prepare(files[:3], ["a", "b", "c"], VISION, LIMITS)) == 3
    monkeypatch.setattr(images, "_decoded", lambda *_: pytest.fail("none may be decoded"))
    with pytest.raises(InvalidRequest) as error:
        prepare(files, ["a", "b", "c", "d"], VISION, LIMITS)
    assert (error.value.limit, error.value.value) == ("4000 tokens", str(4 * num_tokens))


def test_tokens_count_as_the_image_lies_once_it_is_turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    file = file_of(Image.new("L", (280, 28)), "JPEG", exif=exif.tobytes())  # 11 tokens lying, 20 upright
    assert prepared(file, ImageLimits(4, 1 << 20, 1_000_000, 20)).grid.num_tokens == 20
    assert refused(file, ImageLimits(4, 1 << 20, 1_000_000, 19)).value == "20"


def test_nothing_is_decoded_before_all_headers_are_checked(monkeypatch):
    monkeypatch.setattr(images, "_decoded", lambda *_: pytest.fail("the second one is refused first"))
    with pytest.raises(InvalidRequest) as error:
        prepare([picture(), b"none"], ["images[0]", "images[1]"], VISION, LIMITS)
    assert error.value.field == "images[1]"


# --- what is no image --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", [b"", b"\x00", b"hello", b"<svg/>", b"\xff\xd8", b"GIF89a", b"RIFF....WEBP", bytes(99)]
)
def test_what_is_no_image_is_refused(file):
    assert refused(file).limit == "PNG, JPEG, WEBP, GIF"


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "ICO", "PPM", "TGA", "PCX", "EPS", "PDF", "JPEG2000", "DDS"])
def test_other_formats_are_not_tried_whatever_they_are_called(kind):
    assert refused(picture(32, 32, kind)).limit == "PNG, JPEG, WEBP, GIF"


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_animated_files_are_refused(kind):
    error = refused(animated(kind))
    assert error.value == "3"
    assert "animated" in error.message


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files_are_refused(kind, share):
    file = picture(120, 90, kind)
    refused(file[: int(len(file) * share)])


def test_a_png_of_no_size_is_refused():
    refused(png(0, 5, b""))


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_give_an_image_or_a_refusal(kind):
    file, rng = picture(60, 45, kind), random.Random(kind)
    for _ in range(150):
        damaged = bytearray(file)
        for _ in range(rng.randrange(1, 6)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        if rng.random() < 0.3:
            del damaged[rng.randrange(1, len(damaged)) :]
        with contextlib.suppress(InvalidRequest):  # and nothing else
            prepared(bytes(damaged))

"""Resizing against opencv, whose arithmetic the models were trained with."""

import cv2
import numpy as np
import pytest
from image_files import noise
from PIL import Image

from cierzo.engine.text.images import resized

WITHIN = 1e-3  # in levels, of 255
# Wheels of opencv for x86 hand float images to Intel's IPP, whose arithmetic is another, unless that is turned off.
WITHIN_OF_IPP = 0.05
rng = np.random.default_rng(5)
SIZES = [
    *((1, 1, 28, 28), (1, 700, 28, 28), (700, 1, 56, 28), (2, 3, 1540, 28), (28, 28, 28, 28), (1540, 1540, 28, 28)),
    *(tuple(int(side) for side in rng.integers(1, 900, 2)) + tuple(28 * int(n) for n in rng.integers(1, 30, 2))
      for _ in range(40)),
]  # fmt: skip


@pytest.fixture(params=[False, True], ids=["opencv", "ipp"])
def within(request):
    """The largest difference from opencv's own arithmetic, or from IPP's."""
    used = cv2.ipp.useIPP()
    cv2.ipp.setUseIPP(request.param)
    yield WITHIN_OF_IPP if request.param else WITHIN
    cv2.ipp.setUseIPP(used)


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "{}x{}-to-{}x{}".format(*sizes))
def test_resizing_is_opencv_s_bicubic_one(sizes, within):
    width, height, new_width, new_height = sizes
    image = noise(width, height, seed=width * 1000 + height)
    theirs = cv2.resize(image.astype(np.float32), (new_width, new_height), interpolation=cv2.INTER_CUBIC)
    ours = resized(image, new_width, new_height)
    assert ours.dtype == np.float32
    assert ours.shape == (new_height, new_width, 3)
    assert np.abs(ours - theirs).max() < within


def test_pillow_s_bicubic_is_another_one():
    image = noise(300, 200)
    pillow = np.asarray(Image.fromarray(image).resize((56, 56), Image.Resampling.BICUBIC), np.float32)
    assert np.abs(resized(image, 56, 56) - pillow).mean() > 10

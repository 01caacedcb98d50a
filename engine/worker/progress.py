"""Progress of loading: a bar on a terminal, else a line in the log every few seconds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from cierzo.engine.errors import amount
from cierzo.engine.weights.folder import GB
from cierzo.engine.weights.loader import Progress

log = logging.getLogger(__name__)  # a core's own log tells warnings, and this

LINE_EVERY_S = 5.0


@contextmanager
def loading_progress(clock: Callable[[], float] = time.monotonic) -> Iterator[Progress]:
    """Show the bytes that are loaded once it takes more than two seconds on a terminal, or five anywhere else."""
    with tqdm(desc="loading", unit="B", unit_scale=True, delay=2.0, disable=None, leave=False) as bar:
        begun_s = told_s = clock()

        def show(done_bytes: int, total_bytes: int) -> None:
            nonlocal told_s
            bar.total = total_bytes
            bar.update(done_bytes - bar.n)
            if bar.disable and clock() - told_s >= LINE_EVERY_S:
                told_s = clock()
                text = "loading: %s of %s GB in %.0f s"
                log.info(text, amount(done_bytes, GB), amount(total_bytes, GB), told_s - begun_s)

        yield show

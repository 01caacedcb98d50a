"""A short run of the fuzzer, the whole corpus, and proof that a fault is found. Long form: `make fuzz`."""

from __future__ import annotations

import pytest

from cierzo.engine.frontend.frames import FrameSplitter
from cierzo.engine.frontend.heap import Heap
from cierzo.engine.frontend.methods import Methods
from cierzo.engine.text.parts import PartsReader
from fuzz import __main__ as fuzz
from fuzz import targets
from fuzz.make_corpus import FRAMES, SEQUENCES


@pytest.fixture
def connections():
    server = targets.Connections()
    yield server
    server.close()


def test_the_corpus_is_sound(connections):
    frames, sequences = targets.entries("frames"), targets.entries("sequences")
    assert len(frames) >= len(FRAMES)
    assert len(sequences) > len(SEQUENCES)
    for body in frames:
        targets.frame(body)
        connections.sequence(len(body).to_bytes(4, "big") + body)
    for data in (*frames, *sequences):
        targets.splitter(data)
    for data in sequences:
        connections.sequence(data)


def test_mutated_frames():
    assert fuzz.run_frames(seed=1, count=30_000) == (30_000, "")


def test_mutated_connections():
    assert fuzz.run_sequences(seed=1, count=600) == (600, "")


def test_mutated_answers():
    for data in targets.entries("answers"):
        targets.parts(data)
    assert fuzz.run_parts(seed=1, count=400) == (400, "")


@pytest.fixture
def nothing_is_kept(monkeypatch, tmp_path):
    """Findings of a fault that was put in are not for the corpus."""
    for folder in ("frames", "sequences", "answers"):
        (tmp_path / folder).mkdir()
        for number, data in enumerate(targets.entries(folder)):
            (tmp_path / folder / f"{number}.bin").write_bytes(data)
    names = [*fuzz._names()]
    monkeypatch.setattr(fuzz, "_names", lambda: names)
    monkeypatch.setattr(targets, "CORPUS", tmp_path)


@pytest.mark.usefixtures("nothing_is_kept")
def test_a_decoder_that_raises_is_found(monkeypatch):
    monkeypatch.setattr(targets, "UNDECODABLE", (UnicodeDecodeError,))
    assert fuzz.run_frames(seed=1, count=3000)[1]


@pytest.mark.usefixtures("nothing_is_kept")
def test_a_method_that_breaks_is_found(monkeypatch):
    ping = Methods._ping

    def breaks(self, sink, message):
        assert message.stream != 7, "told to"
        ping(self, sink, message)

    monkeypatch.setattr(Methods, "_ping", breaks)
    assert "told to" in fuzz.run_sequences(seed=1, count=300)[1]


@pytest.mark.usefixtures("nothing_is_kept")
def test_pixels_that_outlive_their_request_are_found(monkeypatch):
    monkeypatch.setattr(Heap, "let_go", lambda self, stream: None)
    assert fuzz.run_sequences(seed=1, count=100)[1]


@pytest.mark.usefixtures("nothing_is_kept")
def test_a_reader_that_counts_a_token_twice_is_found(monkeypatch):
    credit = PartsReader._credit
    monkeypatch.setattr(PartsReader, "_credit", lambda self, num: credit(self, num + (num > 1)))
    assert fuzz.run_parts(seed=1, count=1500)[1]


@pytest.mark.usefixtures("nothing_is_kept")
def test_a_splitter_that_loses_bytes_is_found(monkeypatch):
    feed = FrameSplitter.feed

    def lossy(self, data):
        yield from feed(self, data)
        if len(self._rest) == 3:
            self._rest.clear()

    monkeypatch.setattr(FrameSplitter, "feed", lossy)
    assert fuzz.run_frames(seed=1, count=30_000)[1]

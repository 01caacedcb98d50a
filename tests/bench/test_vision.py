"""The benchmark of the vision tower: its figures, from towers of known time; and a whole run, of a tiny one."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from cierzo.bench import vision


def test_images_are_seen_in_turn_after_one_that_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seen = [0.0], list[str]()
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def tower(name: str, seconds: float, value: float) -> vision.See:
        def see(pixels: Tensor) -> Tensor:
            assert pixels.shape == (56, 28, 3)
            seen.append(name)
            clock[0] += seconds
            return torch.full((2, 4), value)

        return see

    row = vision.measure(tower("ours", 2.0, 1.1), tower("theirs", 3.0, 1.0), 28, 56, 2)
    assert seen == ["theirs", "ours", "ours", "theirs", "ours", "theirs"]
    assert (row.ours_s, row.theirs_s, row.tokens) == ((2.0, 2.0), (3.0, 3.0), 2)
    assert row.ratio == 1.5
    assert row.error == pytest.approx(0.1, rel=1e-5)
    assert row.megapixels == 28 * 56 / 1e6


def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    words = ["--scale", "tiny", "--sizes", "60x30", "--repeats", "1", "--dtype", "float32", "--json", str(file)]
    assert vision.main(words) == 0
    assert "84x56" in capsys.readouterr().out
    (row,) = msgspec.json.decode(file.read_bytes())["results"]
    assert row["error"] < 1e-4
    assert (row["width"], row["height"], row["tokens"]) == (84, 56, 6)


@pytest.mark.parametrize("word", ["0x30", "30", "1541x10", "30x-2", "x"])
def test_sizes_that_are_none_are_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        vision.main(["--sizes", word])
    assert f"must be WIDTHxHEIGHT of 1 to 1540 pixels, got '{word}'" in capsys.readouterr().err

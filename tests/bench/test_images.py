"""The benchmark of prompts with images: figures of a clock that stands still but for calls, and a whole run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from cierzo.bench import images
from cierzo.engine.text.short_tekken import short_tekken
from cierzo.engine.weights.make import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeing") / "model"
    return make_checkpoint(folder, like="small4", tokenizer=short_tekken, vision=True)


def test_an_image_is_new_then_known_then_in_the_same_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seen = [0.0], set[Any]()
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    class Engine:
        def chat(self, turns: list[dict[str, Any]], images: list[bytes], max_tokens: int) -> Any:
            for found in (images[0], turns[0]["content"]):
                clock[0] += 0 if found in seen else 2
                seen.add(found)
            clock[0] += 1
            return SimpleNamespace(prompt_token_ids=[5] * 40)

        def generate(self, prompts: Any, max_tokens: int) -> list[Any]:
            assert prompts.shape == (1, 40)
            clock[0] += 3
            return [SimpleNamespace(prompt_token_ids=prompts[0])]

    engine: Any = Engine()
    row = images.measure(engine, 28, 56, 2)
    assert (row.new_s, row.known_s, row.same_s, row.words_s) == ((5, 5), (3, 3), (1, 1), (3, 3))
    assert (row.width, row.height, row.tokens) == (28, 56, 40)


def test_a_whole_run(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    assert images.main([str(checkpoint), "--sizes", "60x30", "--repeats", "1", "--json", str(file)]) == 0
    assert "84x56" in capsys.readouterr().out
    row, memory = msgspec.json.decode(file.read_bytes())["results"]
    assert (row["width"], row["height"]) == (84, 56)
    assert 0 < memory["before_gb"] <= memory["loaded_gb"] <= memory["peak_gb"]


def test_without_a_tower_memory_alone_is_measured(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert images.main([str(checkpoint), "--text-only"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("resident GB: ")


def test_a_checkpoint_without_a_tower_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_checkpoint(tmp_path / "model", like="small4", tokenizer=short_tekken)
    assert images.main([str(folder)]) == 2
    assert "has no vision tower" in capsys.readouterr().err

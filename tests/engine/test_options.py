"""Options come from structs, and go back into them."""

from __future__ import annotations

import argparse

import pytest

from cierzo.cli import build_parser, main
from cierzo.engine.config import EngineOptions
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.messages import SamplingParams
from cierzo.engine.options import add_options, chosen


def _parse(struct: type, *words: str) -> dict[str, object]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_options(parser, struct, skip={"model", "kernels", "frontend", "logit_bias"})
    return chosen(parser.parse_args(words), struct, skip={"model", "kernels", "frontend", "logit_bias"})


def test_nothing_given_is_the_struct_itself() -> None:
    assert SamplingParams(**_parse(SamplingParams)) == SamplingParams()
    assert FrontendConfig(**_parse(FrontendConfig)) == FrontendConfig()
    assert EngineOptions(model="x", **_parse(EngineOptions)) == EngineOptions(model="x")


def test_values_have_the_types_of_their_fields() -> None:
    words = (
        "--stop",
        "a b",
        "--stop",
        "c",
        "--stop-token-ids",
        "7",
        "--ignore-eos",
        "--seed",
        "5",
        "--top-p",
        "0.5",
    )
    assert SamplingParams(**_parse(SamplingParams, *words)) == SamplingParams(
        stop=("a b", "c"), stop_token_ids=(7,), ignore_eos=True, seed=5, top_p=0.5
    )
    given = _parse(EngineOptions, "--no-prefix-caching", "--kv-cache-gib", "0.5", "--device", "cpu")
    assert (given["prefix_caching"], given["kv_cache_gib"], given["device"]) == (False, 0.5, "cpu")


def test_serve_takes_the_limits_of_the_front_end() -> None:
    arguments = build_parser().parse_args(["serve", "x", "--max-connections", "3", "--handshake-timeout-s", "0.5"])
    limits = FrontendConfig(**chosen(arguments, FrontendConfig, skip={"address"}))
    assert limits == FrontendConfig(max_connections=3, handshake_timeout_s=0.5)


@pytest.mark.parametrize("words", [["info", "x"], ["chat"], ["make-checkpoint", "x", "--like", "small3"]])
def test_every_command_refuses_an_unknown_variable(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CIERZO_THREDS", "2")
    assert main(words) == 2
    assert "unknown environment variable CIERZO_THREDS" in capsys.readouterr().err

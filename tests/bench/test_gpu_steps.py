"""Predicted whole steps: their parts, and those of another revision beside them."""

from __future__ import annotations

import json

import pytest

from cierzo.bench.gpu import steps


def test_the_parts_of_a_step_are_its_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert steps.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [*found] == ["decode 1 of 4,096", "decode 64 of 4,096", "decode 256 of 4,096", "prefill 8,192"]
    for parts in found.values():
        assert all(ms > -1e-6 for ms in parts.values())
        assert {steps.REST, "expert_terms nvfp4", "latents_of fp8", "draw bf16"} <= parts.keys()
    assert found["prefill 8,192"]["mla_values fp8"] == found["decode 64 of 4,096"]["mla_prefill fp8"] == 0
    batch = [sum(found[f"decode {count} of 4,096"].values()) for count in steps.BATCHES]
    assert batch == sorted(batch)
    assert steps.main([]) == 0
    assert f"the whole step{batch[0]:40.3f}" in capsys.readouterr().out


def test_operations_that_only_one_of_two_revisions_has_are_told() -> None:
    now, before = {"decode": {"fused": 2.0, "linear": 1.0}}, {"decode": {"norm": 5.0, "linear": 1.0}}
    lines = [" ".join(line.split()) for line in steps.told(now, before, "abc")]
    assert lines == [
        "decode ms abc times",
        "the whole step 3.000 6.000 2.00",
        "fused 2.000 0.000 0.00",
        "linear 1.000 1.000 1.00",
        "norm 0.000 5.000 0.00",
        "",
    ]


@pytest.mark.skipif(not (steps.ROOT / ".git").exists(), reason="no repository to ask")
def test_a_revision_prices_itself() -> None:
    assert steps.steps_of("HEAD").keys() == steps.steps().keys()

"""Short runs of `cierzo bench fairness`: what tenants are still served beside one that asks for too much."""

from __future__ import annotations

from pathlib import Path

import pytest

from cierzo.bench.fairness import FairnessSettings, flood, measure, modest
from cierzo.cli import main
from cierzo.engine.weights.make import make_checkpoint

FAKE = FairnessSettings(steps=500)
SIMULATED = FairnessSettings(model="small4", device="simulated:h200", weights="nvfp4", steps=240)


@pytest.mark.parametrize("settings", [FAKE, SIMULATED], ids=["fake", "simulated"])
def test_every_bound_is_kept(settings: FairnessSettings) -> None:
    found = measure(settings)
    assert found.is_fair, found


def test_the_bounds_are_kept_on_a_model(tmp_path: Path) -> None:
    """In steps: seconds, which a busy machine spoils, are for `cierzo bench fairness --model CHECKPOINT`."""
    folder = make_checkpoint(tmp_path / "tiny", like="small4", scale="tiny")
    settings = FairnessSettings(model=str(folder), steps=100, max_running=32, input_tokens=24, output_tokens=8)
    apart, together = (flood(settings, apart=apart) for apart in (True, False))
    total = sum(apart.service.values())
    assert min(apart.service.values()) >= 0.9 * total / settings.tenants
    assert total >= 0.97 * sum(together.service.values())
    alone, beside = (modest(settings, total / apart.steps, beside=beside).waits for beside in (False, True))
    assert beside[int(0.99 * (len(beside) - 1))] <= alone[int(0.99 * (len(alone) - 1))] + 2


def test_without_tenants_a_flood_takes_nearly_all_and_others_wait() -> None:
    """The measure sees what it is for: as one tenant, first come first served."""
    served = flood(FAKE, apart=False).service
    assert min(served.values()) < 0.7 * sum(served.values()) / FAKE.tenants


def test_the_command_prints_the_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "fairness", "--steps", "300"]) == 0
    assert "of first come, first served" in capsys.readouterr().out

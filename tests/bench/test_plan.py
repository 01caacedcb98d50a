"""`cierzo plan`: what it prints and refuses, the search within limits, and what changes bring."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import msgspec
import pytest
from stated_cards import stated
from steps_by_hand import Chunk, Step, take

from cierzo.bench.experts import ExpertsSettings
from cierzo.bench.plan import command
from cierzo.bench.plan.search import DevicePlan, LatencyLimits, Planner, other_cards, read_experts
from cierzo.bench.report import Recording
from cierzo.bench.workload import TracedRequest, Workload, parse_workload
from cierzo.cli import main
from cierzo.engine import config
from cierzo.engine.config import EngineOptions
from cierzo.engine.cost.cards import find_device, named
from cierzo.engine.cost.operations import random_distinct
from cierzo.engine.cost.work import measured_distinct
from cierzo.engine.errors import ConfigError
from cierzo.engine.expert_statistics import ExpertStatistics, StepBucket

OPTIONS = EngineOptions(model="small4", profile="throughput")


def _plan(text: str, name: str = "h200", limits: LatencyLimits | None = None, **options: Any) -> DevicePlan:
    given = msgspec.structs.replace(OPTIONS, **options)
    return Planner(given, parse_workload(text), limits or LatencyLimits()).plan(name, changes=False)


def test_several_cards_in_one_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report = tmp_path / "plan.json"
    argv = ["plan", "small4", "--device", "h200,h100", "--workload", "512/32@8", "--weights", "fp8"]
    assert main([*argv, "--json", str(report)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("planned, not measured: small4, 512/32@8; experts as if chosen at random")
    lines = {label: cells for label, *cells in (re.split(r" {2,}", line) for line in text.splitlines())}
    assert lines["shares of the device"] == 2 * ["predicted from the machine code of Triton 3.6.0"]
    assert re.match(r"memory of expert_terms fp8, \d+%$", lines["limited by"][0])
    assert lines["fits"] == ["yes", "no"]
    assert "h100: cannot run: the GPU has 74.5 GiB free; weights in fp8 take 112.9 GiB" in text
    h200, h100 = json.loads(report.read_text())["results"]
    assert h100["forecast"] is None
    assert f"{h200['forecast']['requests_per_s']:,.2f}" == lines["requests/s"][0]
    gains = [change["gain"] for change in h200["changes"]]
    assert gains == sorted(gains, reverse=True)
    words = [change["what"] for change in h200["changes"]]
    for expected in ("weights nvfp4", "weights bf16", "device 2xh200", "KV cache fp8", "max_running 512"):
        assert expected in words
    assert sum("step: " in word for word in words) == 2
    refused = [change for change in h200["changes"] if change["refused"]]
    assert [change["what"] for change in refused] == ["weights bf16"]


def test_the_tower_and_its_images_take_memory_and_text_only_leaves_them_out() -> None:
    sizes = {"weights": "nvfp4", "kv_dtype": "fp8", "profile": "balanced"}
    seeing, reading = (_plan("64/2@1", "h100", **sizes, text_only=each) for each in (False, True))
    assert seeing.weight_gb - reading.weight_gb == pytest.approx(seeing.tower_gb)
    assert seeing.tower_gb == pytest.approx(0.857, abs=0.001)
    assert reading.kv_gb - seeing.kv_gb == pytest.approx(seeing.tower_gb, abs=0.001)  # images: within workspaces
    more = _plan("64/2@1", "h100", **sizes, image_cache_tokens=32_768)
    assert more.image_gb - seeing.image_gb == pytest.approx(2 * 4096 * 16_384 / 1e9)
    assert (reading.tower_gb, reading.image_gb) == (0, 0)


class Setting(NamedTuple):
    """Settings that decide how long steps of Small 4 take."""

    device: str = "h200"
    weights: str = "fp8"
    page_bytes: int = 1
    fp8_activations: bool = False
    budget_tokens: int = 8192

    def seconds(self, clients: int, input_tokens: int, output_tokens: int) -> tuple[float, float]:
        """Seconds to the end of requests that begin and end together, and between tokens on average."""
        starts = range(0, input_tokens, self.budget_tokens)
        steps = [
            Step(prompts=(Chunk(start, min(self.budget_tokens, input_tokens - start)),) * clients)
            for start in starts
        ]
        steps[-1] = replace(steps[-1], sampled=clients)
        made = [
            Step(contexts=(input_tokens + token,) * clients, sampled=clients) for token in range(1, output_tokens)
        ]
        prompt_s, gaps_s = (sum(map(self._take, part)) for part in (steps, made))
        return prompt_s + gaps_s, gaps_s / len(made)

    def _take(self, step: Step) -> float:
        return take("small4", self.device, step, self.weights, self.page_bytes, self.fp8_activations).total_s


GIVEN = Setting()
# The changes that a plan for Small 4 in FP8 on an H200 looks at. Twice the slots change nothing for one client.
CHANGED = {
    "weights nvfp4": GIVEN._replace(weights="nvfp4"),
    "activations fp8": GIVEN._replace(fp8_activations=True),
    "device 2xh200": GIVEN._replace(device="2xh200"),
    "KV cache bf16": GIVEN._replace(page_bytes=2),
    "twice the step: 16,384 tokens, chunks of 8,192": GIVEN._replace(budget_tokens=16_384),
    "half the step: 4,096 tokens, chunks of 2,048": GIVEN._replace(budget_tokens=4096),
    "max_running 4,096": GIVEN,
}


@pytest.fixture
def _stated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards by name with stated shares."""
    monkeypatch.setattr(config, "find_device", lambda name: stated(name) if named(name) else find_device(name))


@pytest.mark.usefixtures("_stated")
@pytest.mark.parametrize(
    "workload",
    [
        parse_workload("9000/11@1"),
        Workload(input_tokens=9000, output_tokens=11, rate=0.01, requests=5),  # each is alone
    ],
    ids=["closed", "open"],
)
def test_changes_bring_what_steps_priced_by_hand_do(workload: Workload) -> None:
    """A prompt of 9,000 tokens takes one, two or three steps. An open load gains in time, not in requests."""
    plan = Planner(msgspec.structs.replace(OPTIONS, weights="fp8"), workload, LatencyLimits()).plan("h200")
    assert plan.forecast is not None
    given_s, _ = GIVEN.seconds(1, 9000, 11)
    assert plan.forecast.completion_s.p50 == pytest.approx(given_s, rel=1e-6)
    taken_s = {what: setting.seconds(1, 9000, 11)[0] for what, setting in CHANGED.items()}
    changes = {change.what: change for change in plan.changes}
    assert changes.pop("weights bf16").refused
    assert list(changes) == sorted(taken_s, key=taken_s.__getitem__)
    for what, change in changes.items():
        assert change.gain == pytest.approx(given_s / taken_s[what], rel=1e-6), what
        assert change.completion_p50_s == pytest.approx(taken_s[what], rel=1e-6), what
        if workload.concurrency is not None:
            assert change.requests_per_s == pytest.approx(1 / taken_s[what], rel=1e-6), what


@pytest.mark.usefixtures("_stated")
def test_an_open_load_gains_in_the_median_of_completion_times() -> None:
    """Where requests meet, so that their times differ."""
    workload = Workload(input_tokens=512, output_tokens=64, rate=4.0, requests=64)
    plan = Planner(msgspec.structs.replace(OPTIONS, weights="fp8"), workload, LatencyLimits()).plan("h200")
    assert plan.forecast is not None
    first, given = plan.changes[0], plan.forecast.completion_s
    assert first.what == "weights nvfp4"
    assert given.p99 > 1.01 * given.p50
    assert first.gain == pytest.approx(given.p50 / first.completion_p50_s)


@pytest.mark.usefixtures("_stated")
def test_changes_within_a_limit_bring_what_steps_priced_by_hand_do() -> None:
    """More clients, as many as keep the limit; and so more requests a second."""
    limits = LatencyLimits(max_inter_token_ms=8.3, statistic="mean")
    options = msgspec.structs.replace(OPTIONS, weights="fp8")
    plan = Planner(options, parse_workload("16/20@1"), limits).plan("h200")

    def most(setting: Setting) -> int:
        return next(clients for clients in range(1, 50) if setting.seconds(clients + 1, 16, 20)[1] > 8.3e-3)

    def rate(setting: Setting) -> float:
        return most(setting) / setting.seconds(most(setting), 16, 20)[0]

    assert (most(GIVEN), most(CHANGED["weights nvfp4"])) == (7, 15)
    assert plan.workload == "16/20@7"
    assert plan.forecast is not None
    assert plan.forecast.requests_per_s == pytest.approx(rate(GIVEN), rel=1e-6)
    changes = {change.what: change for change in plan.changes}
    for what in ("weights nvfp4", "KV cache bf16", "activations fp8", "device 2xh200"):
        assert changes[what].gain == pytest.approx(rate(CHANGED[what]) / rate(GIVEN), rel=1e-6), what


def test_the_next_card_and_twice_the_cards() -> None:
    assert other_cards("h100") == ["h200", "2xh100"]
    assert other_cards("4xh100") == ["4xh200", "8xh100"]
    assert other_cards("2xh200") == ["4xh200"]
    assert other_cards("build/some.json") == []


@pytest.mark.parametrize("statistic", ["mean", "p50", "p99"])
def test_the_most_clients_within_a_limit(statistic: Any) -> None:
    limits = LatencyLimits(max_inter_token_ms=20.0, statistic=statistic)
    plan = _plan("256/64@1", limits=limits, max_chunk_tokens=256, budget_tokens=2048)
    assert plan.forecast is not None
    assert limits.broken(plan.forecast) is None
    clients = parse_workload(plan.workload).concurrency
    assert clients is not None
    more = _plan(f"256/64@{clients + 1}", max_chunk_tokens=256, budget_tokens=2048).forecast
    assert more is not None
    assert limits.broken(more) is not None or clients > 50  # above, the search ends 2 % below the limit


@pytest.mark.usefixtures("_stated")
def test_the_highest_rate_within_a_limit() -> None:
    limits = LatencyLimits(max_ttft_ms=100.0)
    given = Workload(input_tokens=256, output_tokens=16, rate=1.0, requests=120)
    plan = Planner(OPTIONS, given, limits).plan("h200", changes=False)
    found = parse_workload(plan.workload).rate
    assert found is not None
    assert found > 5
    over = msgspec.structs.replace(given, rate=found * 1.05)
    beyond = Planner(OPTIONS, over, LatencyLimits()).plan("h200", changes=False).forecast
    assert beyond is not None
    assert "time to first token p99" in str(limits.broken(beyond))


def test_a_limit_that_one_client_breaks_is_refused_with_the_numbers() -> None:
    plan = _plan("20000/16@4", limits=LatencyLimits(max_ttft_ms=10))
    assert plan.forecast is None
    assert plan.refused.startswith("workload 20000/16@1: time to first token p99 ")
    assert plan.refused.endswith("limit 10 ms")


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (
            ["--device", "h300", "--workload", "9/9@1"],
            2,
            "or a JSON file, got 'h300'",
        ),
        (["--device", "0xh100", "--workload", "9/9@1"], 2, "got '0xh100'"),
        (["--device", "h200", "--workload", "9/9"], 2, "workload must be IN/OUT@CLIENTS"),
        (["--device", "h200", "--workload", "9/9@1", "--experts", "none.json"], 2, "expert statistics none.json"),
        (["--device", "h200", "--workload", "9/9@1", "--json", "no/where.json"], 2, "cannot be written"),
        (["--device", "h200", "--workload", "300000/9@1"], 1, "300,009 tokens, and max_model_len is 262,144"),
        (["--device", "h200", "--workload", "9/9@5000"], 1, "5,000 requests at once, and the queue takes 4,096"),
        (["--device", "h200", "--workload", "9/9@1", "--kv-dtype", "int8"], 1, "int8 has no kernels on a GPU"),
        (["--device", "h200", "--workload", "9/9@1", "--weights", "bf16"], 1, "weights in bf16 take 222.5 GiB"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(
    argv: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "small4", "--profile", "throughput", *argv]) == status
    out, err = capsys.readouterr()
    assert words in out + err


def _write_report(path: Path, statistics: ExpertStatistics) -> None:
    """As `cierzo bench experts --json` does."""
    Recording("experts", path).write(ExpertsSettings(rpc="unix:somewhere"), statistics)


def _statistics(shares: list[int]) -> ExpertStatistics:
    """36 layers alike, of which each expert had so many of 1,000 tokens."""
    bucket = StepBucket(most_tokens=1, steps=1000, tokens=1000, distinct=[4000] * 36)
    return ExpertStatistics(
        layers=list(range(36)),
        num_experts=len(shares),
        top_k=4,
        expert_tokens=[shares] * 36,
        decode=[bucket],
        prefill=[],
    )


def test_experts_of_real_traffic(tmp_path: Path) -> None:
    """Choices that are even give what chance would; choices that are not touch fewer experts, which is quicker."""
    even = measured_distinct(_statistics([1000 * 4 // 128] * 96 + [32] * 32))  # 4,000 choices in all, nearly even
    for tokens in (1.0, 8.0, 64.0, 700.0):
        assert even(tokens) == pytest.approx(random_distinct(128, 4, tokens), rel=0.02)
    assert even(0.0) == 0.0
    path = tmp_path / "experts.json"
    _write_report(path, _statistics([120] * 32 + [1] * 64 + [3] * 32))
    skewed = Planner(
        OPTIONS,
        parse_workload("64/64@32"),
        LatencyLimits(),
        experts=read_experts(path),
    ).plan("h200", changes=False)
    uniform = _plan("64/64@32").forecast
    assert uniform is not None
    assert skewed.forecast is not None
    assert skewed.forecast.distinct_experts < 0.7 * uniform.distinct_experts
    assert skewed.forecast.requests_per_s > 1.2 * uniform.requests_per_s


def test_experts_of_another_model_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "experts.json"
    _write_report(path, _statistics([125] * 32))
    argv = ["plan", "small4", "--profile", "throughput", "--device", "h200", "--workload", "9/9@1"]
    assert main([*argv, "--experts", str(path)]) == 1
    assert "36 layers of 32 experts, 4 a token; small4 has 36 layers of 128 experts" in capsys.readouterr().out
    _write_report(path, msgspec.structs.replace(_statistics([125] * 32), decode=[]))
    assert main([*argv, "--experts", str(path)]) == 2
    assert "nothing was counted" in capsys.readouterr().err


def test_a_trace_is_held_to_the_limits(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"arrival_s": 0, "input_tokens": 9000, "output_tokens": 8}')
    kept, broken = (_plan(str(path), limits=LatencyLimits(max_ttft_ms=ms)) for ms in (1e6, 1))
    assert kept.forecast == _plan(str(path)).forecast
    assert broken.forecast is None
    assert broken.refused.startswith("workload trace of 1 requests in 0 s: time to first token p99 ")
    assert broken.refused.endswith("limit 1 ms")


def test_a_figure_that_cannot_be_drawn_is_refused_before_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    argv = ["plan", "small4", "--device", "h200", "--workload", "9/9@1", "--png", str(tmp_path / "plan.png")]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert (out, "plan.png needs matplotlib: pip install" in err) == ("", True)


def test_the_report_is_there_when_drawing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ConfigError("no picture")

    monkeypatch.setattr(command, "draw", broken)
    monkeypatch.setitem(sys.modules, "matplotlib", ModuleType("matplotlib"))
    report = tmp_path / "plan.json"
    argv = ["plan", "small3", "--profile", "throughput", "--device", "h200", "--workload", "64/8@4"]
    assert main([*argv, "--png", str(tmp_path / "plan.png"), "--json", str(report)]) == 2
    assert json.loads(report.read_bytes())["results"][0]["forecast"]["requests_per_s"] > 0


def test_help_names_the_fields_of_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    told = capsys.readouterr().out
    assert [name for name in TracedRequest.__struct_fields__ if f'"{name}"' not in told] == []


def test_the_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    argv = ["plan", "small3", "--profile", "throughput", "--device", "h200", "--workload", "64/8@4"]
    assert main([*argv, "--png", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_limits_tell_what_is_broken() -> None:
    forecast = _plan("512/64@16").forecast
    assert forecast is not None
    assert not LatencyLimits().given
    assert LatencyLimits(max_ttft_ms=1e6, max_inter_token_ms=1e6).broken(forecast) is None
    assert "inter-token time p99" in str(LatencyLimits(max_inter_token_ms=1.0).broken(forecast))
    assert (
        LatencyLimits().broken(msgspec.structs.replace(forecast, keeps_up=False))
        == "requests come faster than they end"
    )


@pytest.mark.usefixtures("_stated")
def test_a_device_that_is_not_a_name_is_read_from_its_file(tmp_path: Path) -> None:
    twice = msgspec.structs.replace(stated("h200"), name="twice", bytes_per_s=9.6e12, step_overhead_s=0.5e-3)
    path = tmp_path / "twice.json"
    path.write_bytes(msgspec.json.encode(twice))
    quick, usual = _plan("16/64@16", str(path)).forecast, _plan("16/64@16").forecast
    assert quick is not None
    assert usual is not None
    assert quick.requests_per_s == pytest.approx(2 * usual.requests_per_s, rel=0.05)
    path.write_bytes(b"{}")
    with pytest.raises(ConfigError, match=r"a JSON file that describes a device .*twice\.json"):
        _plan("16/64@16", str(path))

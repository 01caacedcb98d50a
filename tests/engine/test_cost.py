"""The roofline: works against sums written out by hand, devices, and the times that follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from stated_cards import STATED, stated
from steps_by_hand import Chunk, Step, take

from cierzo.bench.gpu.calls import CASES
from cierzo.engine.config import EngineOptions, resolve
from cierzo.engine.cost.cards import HOST_STEP_S, PREDICTED, find_device, named, with_measured
from cierzo.engine.cost.device import Curve, Device
from cierzo.engine.cost.launched import launched_work
from cierzo.engine.cost.operations import Work
from cierzo.engine.cost.roofs import HOST_LAUNCH_S
from cierzo.engine.cost.step_model import StepModel, price, step_time
from cierzo.engine.cost.weights import NumberFormats, weight_bytes
from cierzo.engine.cost.work import StepShape, step_work, tower_work
from cierzo.engine.errors import ConfigError
from cierzo.engine.model.config import ModelConfig
from cierzo.engine.weights.shapes import named_model_config
from cierzo.engine.weights.vision_shapes import planned_model_config
from cierzo.engine.worker.step_cost import fitted_cost

DECODE_ONE = StepShape(absorbed_tokens=1.0, absorbed_pairs=2048.0, absorbed_context=2048.0, sampled=1.0)


def model(name: str) -> ModelConfig:
    found = named_model_config(name)
    assert found is not None
    return found


def works(name: str, step: StepShape, weights: str = "fp8", kv: str = "fp8") -> dict[str, Work]:
    config = model(name)
    found = step_work(config, config.cache_layout(32, kv), NumberFormats(weights=weights), step)
    return {work.operation: work for work in found}


def launches(name: str, step: StepShape, weights: str = "fp8", activations: str = "bf16") -> list[Work]:
    config, formats = model(name), NumberFormats(weights=weights, activations=activations)
    return launched_work(config, config.cache_layout(32, "fp8"), formats, step)


def test_a_decoded_token_of_small_4_reads_its_weights_and_latents_once() -> None:
    found = works("small4", DECODE_ONE)
    expert, scales, rows = 3 * 4096 * 2048, 4 * (2 * 2048 + 4096), 2 * 4096 * 2
    assert found["expert_mlp"].num_bytes == pytest.approx(36 * (5 * (expert + scales) + rows))  # four, one shared
    assert found["expert_mlp"].operations == pytest.approx(36 * 5 * 2 * expert)
    assert found["mla_decode"].num_bytes == 36 * (2048 * 320 + 2 * 32 * (320 + 256))
    assert found["mla_decode"].operations == 36 * 2 * 32 * 2048 * (320 + 256)
    assert found["mla_prefill"].operations == 0
    assert found["lm_head"].num_bytes == pytest.approx(2 * 131_072 * 4096, rel=1e-3)
    linear = 4096 * 1344 + 1024 * 4096 + 4096 * 4096
    scales, rows = 4 * (1344 + 4096 + 4096), 2 * (4096 + 1344 + 1024 + 4096 + 4096 + 4096)
    assert found["linear"].num_bytes == 36 * (linear + scales + rows)
    assert found["linear"].calls == 3 * 36


def test_a_decoded_token_of_small_3_reads_its_weights_keys_and_values_once() -> None:
    found = works("small3", DECODE_ONE, "bf16", "bfloat16")
    assert found["gated_mlp"].num_bytes == pytest.approx(40 * 3 * 5120 * 32_768 * 2, rel=1e-3)
    assert found["gqa_decode"].num_bytes == 40 * (2048 * 2 * 8 * 128 * 2 + 2 * 32 * 2 * 128)
    assert found["gqa_decode"].operations == 40 * 4 * 2048 * 32 * 128
    assert "expert_mlp" not in found


def test_all_weights_that_a_large_step_reads_are_those_that_the_memory_plan_counts() -> None:
    """A step leaves out the embedding of the plan's bytes; W_UV, which both forms read, it has twice."""
    many = 4096.0
    step = StepShape(expanded_tokens=many, absorbed_tokens=many, sampled=many)
    for name, weights in (("small4", "fp8"), ("small4", "nvfp4"), ("small3", "bf16"), ("small3", "fp8")):
        config = model(name)
        layout = config.cache_layout(32, "fp8")
        formats = NumberFormats(weights=weights)
        read = sum(float(work.num_bytes) for work in step_work(config, layout, formats, step))
        twice = StepShape(expanded_tokens=2 * many, absorbed_tokens=2 * many, sampled=2 * many)
        rows = sum(float(work.num_bytes) for work in step_work(config, layout, formats, twice)) - read
        embedding = 2 * config.vocab_size * config.hidden_size
        assert read - rows == pytest.approx(weight_bytes(config, formats) - embedding, rel=0.002)


@pytest.mark.parametrize(("tokens", "distinct"), [(1.0, 4.0), (8.0, 28.7), (64.0, 111.2), (512.0, 128.0)])
def test_distinct_experts_of_random_routing(tokens: float, distinct: float) -> None:
    """Published: "111 of 128 experts loaded at batch 64" (InferenceX, gpt-oss)."""
    step = StepShape(absorbed_tokens=tokens, sampled=tokens)
    expert = 36 * (3 * 4096 * 2048 + 4 * (2 * 2048 + 4096))
    rows = 36 * tokens * 2 * 4096 * 2
    assert (works("small4", step)["expert_mlp"].num_bytes - rows) / expert - 1 == pytest.approx(distinct, abs=0.06)


STEPS = {
    "decode 1": Step(contexts=(2048,), sampled=1),
    "decode 1 of 256k": Step(contexts=(262_144,), sampled=1),
    "decode 64": Step(contexts=tuple(range(1000, 7400, 100)), sampled=64),
    "decode 1024": Step(contexts=(2048,) * 1024, sampled=1024),
    "a prompt's first chunk": Step(prompts=(Chunk(0, 4096),)),
    "a prompt's last chunk": Step(prompts=(Chunk(30_000, 1000),), sampled=1),
    "mixed": Step(contexts=(1500,) * 48, prompts=(Chunk(512, 1000), Chunk(0, 700)), sampled=49),
    "after a preemption": Step(contexts=(900,) * 7, again=(Chunk(3000, 40),), sampled=8),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize(
    ("name", "device", "weights", "kv", "activations"),
    [
        ("small4", "h200", "fp8", "bf16", "bf16"),
        ("small4", "h200", "nvfp4", "fp8", "bf16"),
        ("small4", "4xh100", "bf16", "bf16", "bf16"),
        ("small4", "4xh100", "fp8", "fp8", "fp8"),
        ("small4", "4xh100", "nvfp4", "fp8", "bf16"),
        ("small3", "h200", "bf16", "bf16", "bf16"),
        ("small3", "h200", "nvfp4", "fp8", "bf16"),
        ("small3", "4xh100", "fp8", "fp8", "fp8"),
    ],
)
def test_the_seconds_of_a_step_are_those_counted_by_hand(
    name: str, device: str, weights: Any, kv: Any, activations: Any, step: Step
) -> None:
    options = EngineOptions(model=name, weights=weights, kv_dtype=kv, activations=activations)
    config = resolve(msgspec.structs.replace(options, device=f"simulated:{device}"))
    card = stated(device)
    shape = StepShape(
        expanded_tokens=float(step.prompt_tokens),
        expanded_pairs=float(sum(chunk.pairs for chunk in step.prompts)),
        expanded_context=float(sum(chunk.context for chunk in step.prompts)),
        absorbed_tokens=float(step.generated),
        absorbed_pairs=float(step.generated_pairs),
        absorbed_context=float(step.generated_context),
        sampled=float(step.sampled),
    )
    found = StepModel(config, card).time(shape, rows=float(step.sequences))
    expected = take(name, device, step, weights, 1 if kv == "fp8" else 2, fp8_activations=activations == "fp8")
    assert sum(map(float, found.roofs_s.values())) == pytest.approx(float(found.memory_s + found.arithmetic_s))
    for part, by_hand in expected._asdict().items():
        assert float(getattr(found, part)) == pytest.approx(by_hand, rel=1e-6), part
    assert float(found.total_s) == pytest.approx(expected.total_s, rel=1e-6)


def test_a_step_of_nothing_takes_the_overhead_alone() -> None:
    for name in ("small4", "small3"):
        device = find_device("h200")
        nothing = StepShape()
        found = works(name, nothing).values()
        time = step_time(device, [*found], rows=0.0, launches=launches(name, nothing))
        assert time.total_s == device.step_overhead_s
        assert time.limit_s == time.num_bytes == time.operations == 0


def test_an_array_of_steps_takes_what_each_takes_alone() -> None:
    context = np.array([1.0, 5_000.0, 2_000_000.0])
    count = np.full(3, 16.0)
    shapes = StepShape(
        absorbed_tokens=count,
        absorbed_pairs=context,
        absorbed_context=context,
        expanded_tokens=count,
        sampled=count,
    )
    device = find_device("4xh100")

    def time(shape: StepShape, rows: Any) -> Any:
        found = works("small4", shape).values()
        more = {"exchanged_bytes": rows, "launches": launches("small4", shape)}
        return step_time(device, [*found], rows=rows, **more)

    whole = time(shapes, count)
    for index in range(3):
        one = StepShape(
            absorbed_tokens=16.0,
            absorbed_pairs=context[index],
            absorbed_context=context[index],
            expanded_tokens=16.0,
            sampled=16.0,
        )
        alone = time(one, 16.0)
        assert np.atleast_1d(whole.total_s)[index] == pytest.approx(float(alone.total_s), rel=1e-12)


def test_formats_change_bytes_and_rates() -> None:
    def expert_bytes(weights: str) -> float:
        return float(works("small4", DECODE_ONE, weights)["expert_mlp"].num_bytes)

    assert expert_bytes("nvfp4") / expert_bytes("fp8") == pytest.approx(0.5625, rel=1e-2)
    both = NumberFormats(weights="fp8", activations="fp8")
    assert (both.rate("fp8"), both.rate("bf16"), NumberFormats(weights="fp8").rate("fp8")) == (
        "fp8",
        "bf16",
        "bf16",
    )
    assert (both.measured_as("fp8"), NumberFormats(weights="fp8").measured_as("fp8")) == ("fp8 x fp8", "fp8")
    assert both.measured_as("fp8") in CASES["linear"].formats
    on_cpu = NumberFormats(weights="int4", on_gpu=False)
    assert (on_cpu.of("head"), on_cpu.rate("int4"), on_cpu.rate("bf16")) == ("int8", "int8", "bf16")
    assert NumberFormats(weights="float32", plain="float32", on_gpu=False).rate("float32") == "fp32"


def test_several_cards_divide_experts_and_keep_attentions_weights() -> None:
    one, four = find_device("h100"), find_device("4xh100")
    found = [*works("small4", DECODE_ONE).values()]
    priced = launches("small4", DECODE_ONE)
    alone, together = (step_time(device, found, rows=1.0, launches=priced) for device in (one, four))
    whole = sum(float(work.replicated_bytes) for work in found)
    shared = sum(float(work.num_bytes) for work in found) - whole
    assert alone.limit_s == pytest.approx((shared + whole) / one.bytes_per_s)
    assert together.limit_s == pytest.approx((shared / 4 + whole) / one.bytes_per_s)
    assert together.num_bytes == pytest.approx(shared + 4 * whole)


def test_measured_shares_take_the_stated_ones_place() -> None:
    card = stated("h100")
    found = works("small4", DECODE_ONE)
    experts = found["expert_mlp"]
    call_s = float(experts.num_bytes) / card.bytes_per_s / experts.calls
    shares = {call_s * 10: 0.6, call_s / 10: 0.2}
    measured = msgspec.structs.replace(card, measured={"expert_mlp": shares})
    assert measured.measured_share("expert_mlp", "fp8", call_s) == pytest.approx(0.4)  # half way, in the logarithm
    assert measured.measured_share("expert_mlp", "fp8", call_s / 1e6) == pytest.approx(0.2)
    assert measured.measured_share("expert_mlp", "fp8", call_s * 1e6) == pytest.approx(0.6)
    assert measured.measured_share("linear", "fp8", call_s) is None
    before, after = (float(step_time(device, [experts], rows=0.0).memory_s) for device in (card, measured))
    assert before / after == pytest.approx(0.4 / STATED["memory"])


def test_a_device_file_is_read_and_what_is_wrong_in_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    card = msgspec.structs.replace(stated("h100"), name="mine", bytes_per_s=1e12)
    path.write_bytes(msgspec.json.encode(card))
    assert find_device(str(path)) == card
    for wrong, said in (
        ({"cards": 0}, "cards"),
        ({"bytes_per_s": -1.0}, "bytes_per_s"),
        ({"colour": "red"}, "colour"),
        ({"stated": {**STATED, "memory": 5.0}}, "stated"),
        ({"stated": {**STATED, "memory": 1e-300}}, "stated"),
        ({"stated": {"memory": 0.5, "experts": 0.5}}, "there must be attention, products"),
        ({"operations_per_s": {"fp8": 1e15}}, "there must be bf16"),
        ({"operations_per_s": {"bf16": 1e-300}}, "operations_per_s"),
        ({"bytes_per_s": 1e-300}, "bytes_per_s"),
        ({"cards": 2}, "link_bytes_per_s must be at least 1 for 2 cards"),
        ({"calibration": {"checkpoint": "tiny"}}, "it is for --device cpu --calibration FILE"),
        ({"predicted": {"draw bf16": CURVE | {"limits_s": [1e-5]}}}, "two sizes or more"),
        ({"predicted": {"draw bf16": CURVE | {"limits_s": [1e-5, 1e-6]}}}, "each above the one before"),
        ({"predicted": {"draw bf16": CURVE | {"roofs": ["memory"]}}}, "as many as limits_s"),
    ):
        path.write_bytes(msgspec.json.encode(msgspec.to_builtins(card) | wrong))
        with pytest.raises(ConfigError, match=said):
            find_device(str(path))
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"card\.json"):
        find_device(str(path))


def test_names_of_devices() -> None:
    two = named("2xh200")
    assert isinstance(two, Device)
    assert two.step_overhead_s > find_device("h200").step_overhead_s > 0
    assert (two.cards, two.memory_bytes, two.link_bytes_per_s > 0) == (2, 141_000_000_000, True)
    for name in ("b200", "0xh100", "h100x2", "", "4x"):
        assert named(name) is None
        with pytest.raises(ConfigError, match="h100, h200"):
            find_device(name)


CURVE = {"limits_s": [1e-6, 1e-5], "seconds": [1e-6, 1e-5], "roofs": ["memory"] * 2, "launches": [1, 1]}


def test_a_device_without_the_price_of_an_operation_is_refused_before_any_step() -> None:
    known = Curve(**CURVE)  # type: ignore[arg-type]
    device = msgspec.structs.replace(find_device("h200"), predicted={"draw bf16": known})
    options = EngineOptions(model="small4", device="simulated:h200", weights="nvfp4")
    config = msgspec.structs.replace(resolve(options), card=device)
    with pytest.raises(ConfigError, match=r"one with a prediction or a stated share of .*, got 'h200'"):
        StepModel(config, device)


def cell(name: str, us: float, part: str = "kernels", error: str = "") -> dict[str, Any]:
    result = {"bytes": 3.35e6, "flops": 1e6, "us": us, "share": 0.1}  # 1 us of an H100's memory
    return {"subject": part, "cell": name, "error": error, "result": None if error else result}


def test_what_the_gpu_bench_has_measured_takes_the_stated_shares_place(tmp_path: Path) -> None:
    device = find_device("h100")
    assert with_measured(device, "h100", tmp_path) == device
    cells = [
        {"commit": "abc", "device": "NVIDIA H100 80GB HBM3"},
        cell("linear_terms, small4, decode 1, fp8", 2.0),
        cell("linear, small4, decode 8, bf16", 4.0),
        cell("linear_terms, small4, decode 64, fp8", 9.0, error="lost"),
        cell("linear_terms, small4, decode 1, fp8", 9.0, part="conformance"),
    ]
    path = tmp_path / "gpu-nvidia-h100-80gb-hbm3-abc.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in cells), encoding="utf-8")
    found = with_measured(device, "h100", tmp_path)
    assert {name: [*shares.values()] for name, shares in found.measured.items()} == {
        "linear_terms fp8": [pytest.approx(0.5)],
        "linear_in bf16": [pytest.approx(0.25)],  # the bench times the product behind attention for all
    }
    assert path.name in found.source
    assert "shares measured, else predicted from the machine code of Triton 3.6" in found.describe()
    assert "measured" not in device.describe()
    assert with_measured(device, "h200", tmp_path) == device
    path.write_text('{"commit": "abc"}\n{"subject": "kernels"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="line 2"):
        with_measured(device, "h100", tmp_path)


def test_a_measured_time_corrects_the_prediction_at_every_size(tmp_path: Path) -> None:
    """Only the operation that was measured changes; predictions of others stay."""
    path = tmp_path / "gpu-h100-abc.jsonl"
    path.write_text("{}\n" + json.dumps(cell("linear_terms, small4, decode 1, fp8", 7.0)) + "\n", encoding="utf-8")
    predicted = find_device("h100")
    measured = with_measured(predicted, "h100", tmp_path)
    found = {work.operation: work for work in launches("small4", DECODE_ONE)}
    linear, experts = found["linear_terms"], found["expert_terms"]
    before, after = (price(device, linear) for device in (predicted, measured))
    curve = predicted.curve("linear_terms", "fp8", linear.width)
    assert curve is not None
    wrong = float(7e-6 / curve.seconds_of(1e-6))
    assert after.launches == before.launches > 0
    assert {name: float(seconds) for name, seconds in after.roofs_s.items()} == pytest.approx(
        {name: float(seconds) * wrong for name, seconds in before.roofs_s.items()}
    )
    assert price(measured, experts) == price(predicted, experts)
    assert max(price(measured, experts).roofs_s.values()) > 0


def test_between_two_measured_sizes_and_beyond_them_a_prediction_is_as_wrong_as_there() -> None:
    curve = Curve([1e-6, 1e-5, 1e-4, 1e-3], [2e-6, 2e-5, 2e-4, 2e-3], ["memory"] * 4, [1] * 4)
    assert curve.measured({1e-5: 2e-5}).seconds == pytest.approx(curve.seconds)
    found = curve.measured({1e-5: 4e-5, 1e-3: 1e-3})
    assert found.seconds == pytest.approx([4e-6, 4e-5, 2e-4, 1e-3])
    assert (found.limits_s, found.roofs, found.launches) == (curve.limits_s, curve.roofs, curve.launches)


@pytest.mark.parametrize("every", [True, False])
def test_a_prediction_that_a_card_confirms_changes_no_price(tmp_path: Path, every: bool) -> None:
    cells = json.loads(PREDICTED.read_bytes())["cells"]
    chosen = cells if every else ["expert_terms, small4, decode 1, fp8"]
    rows = [
        {"subject": "kernels", "cell": name, "error": "", "result": cells[name] | {"us": cells[name]["h200"][0]}}
        for name in chosen
        if not name.startswith("plan")  # of attention, which the bench does not time
    ]
    path = tmp_path / "gpu-h200-abc.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in [{}, *rows]), encoding="utf-8")
    predicted = find_device("h200")
    measured = with_measured(predicted, "h200", tmp_path)
    prompt = StepShape.of([(0, 16)], generated=False)
    for shape, launched in ((DECODE_ONE, False), (prompt, True)):
        some, priced = [*works("small4", shape).values()], launches("small4", shape)
        before, after = (
            step_time(device, some, rows=1, launches=priced, launched=launched).total_s
            for device in (predicted, measured)
        )
        assert after == pytest.approx(before, rel=1e-9)


def test_a_line_that_a_killed_gpu_bench_left_unfinished_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "gpu-h100-abc.jsonl"
    path.write_text("{}\n" + json.dumps(cell("linear_terms, small4, decode 1, fp8", 2.0)) + '\n{"subject": "ker')
    found = with_measured(find_device("h100"), "h100", tmp_path)
    assert [*found.measured["linear_terms fp8"].values()] == [pytest.approx(0.5)]


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ({"us": 0.0}, "us 0.0: 1 are the least"),
        ({"us": -1.0}, "us -1.0: 1 are"),
        ({"us": float("nan")}, "us nan: 1 are"),
        ({"us": float("inf")}, "us inf: 1 are"),
        ({"us": 1e-9}, "us 1e-09: 1 are the least that this card takes"),
        ({"bytes": 0, "flops": 0}, "us 1.0: 0 are the least"),
        ({"device": "\xff"}, "'utf-8' codec can't decode"),
    ],
)
def test_a_sample_that_gives_no_share_is_refused_with_its_line(
    tmp_path: Path, result: dict[str, Any], said: str
) -> None:
    sample = cell("linear, small4, any, fp8", 1.0)
    sample["result"] |= result
    path = tmp_path / "gpu-h100-abc.jsonl"
    path.write_text("{}\n" + json.dumps(sample, ensure_ascii=False) + "\n", encoding="latin-1")
    with pytest.raises(ConfigError, match=f"{path.name}, line 2: {said}"):
        with_measured(find_device("h100"), "h100", tmp_path)


@pytest.mark.parametrize(
    ("name", "weights", "activations"),
    [("small4", "fp8", "fp8"), ("small4", "nvfp4", "bf16"), ("small3", "bf16", "bf16")],
)
def test_every_operation_of_a_step_is_one_that_the_gpu_bench_measures(
    tmp_path: Path, name: str, weights: Any, activations: Any
) -> None:
    """Where each kernel takes a tenth of its limit's rate, so does each operation; but the plan of attention, which
    is no operation."""
    kernels = (cell(f"{one}, {name}, any, {format}", 10.0) for one in CASES for format in CASES[one].formats)
    path = tmp_path / "gpu-h100-abc.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in [{}, *kernels]), encoding="utf-8")
    device = with_measured(find_device("h100"), "h100", tmp_path)
    for work in launches(name, DECODE_ONE, weights, activations):
        if work.operation == "plan":
            continue
        assert device.measured_share(work.operation, work.format, 1e-6) == pytest.approx(0.1), work.operation


def test_predicted_seconds_lie_between_those_of_their_sizes() -> None:
    """In the logarithms of both; a smaller call takes as long as the least, one twice the largest twice as long."""
    curve = Curve([1e-6, 4e-6], [10e-6, 20e-6], ["issue", "memory"], [2, 4])
    device = msgspec.structs.replace(find_device("h200"), predicted={"draw bf16": curve})

    def of(limit_s: float) -> dict[str, float]:
        found = price(device, Work("draw", limit_s * 4.8e12, calls=1))
        return {name: float(seconds) for name, seconds in found.roofs_s.items() if seconds > 0}

    assert of(1.5e-6) == {"issue": pytest.approx(10e-6 * 1.5**0.5)}
    assert of(3e-6) == {"memory": pytest.approx(10e-6 * 3**0.5)}
    assert of(1e-7) == {"issue": pytest.approx(10e-6)}
    assert of(8e-6) == {"memory": pytest.approx(40e-6)}
    assert of(0.0) == {}


def test_launches_count_where_the_host_is_slower_than_the_device() -> None:
    device, found, priced = (
        find_device("h200"),
        [*works("small4", DECODE_ONE).values()],
        launches("small4", DECODE_ONE),
    )
    count = sum(float(price(device, work).launches) for work in priced)
    drawn = sum(float(price(device, work).launches) for work in priced if work.operation == "draw")
    assert count == 36 * 9 + 4 + drawn  # angles, the plan of attention, the last norm, the head
    replayed = step_time(device, found, rows=1.0, launches=priced)
    launched = step_time(device, found, rows=1.0, launches=priced, launched=True)
    assert float(launched.total_s) == pytest.approx(count * HOST_LAUNCH_S + HOST_STEP_S)
    assert float(replayed.total_s) < 0.5 * float(launched.total_s)
    slow = msgspec.structs.replace(device, launch_s=1e-6)
    assert float(step_time(slow, found, rows=1.0, launches=priced, launched=True).total_s) == replayed.total_s


def test_a_step_s_shape_is_that_of_its_pieces() -> None:
    """A prompt's row sees what comes before it and itself."""
    seen = [6 + row for row in (1, 2, 3)] + [1 + row for row in (1, 2)]
    assert StepShape.of([(6, 3), (1, 2)], generated=False) == StepShape(
        expanded_tokens=5.0, expanded_pairs=float(sum(seen)), expanded_context=9.0 + 3.0, sampled=2.0
    )
    assert StepShape.of([(159, 1)] * 3, generated=True) == StepShape(
        absorbed_tokens=3.0, absorbed_pairs=480.0, absorbed_context=480.0, sampled=3.0
    )


def test_the_tower_s_products_are_counted_by_hand() -> None:
    """An image of 484 tokens, 616 x 616 pixels: each layer multiplies by its weights, and each patch sees all."""
    seeing = planned_model_config("small4", text_only=False)
    assert seeing is not None
    works, patches = tower_work(seeing, NumberFormats(weights="nvfp4"), 484), 44 * 44
    layer = 4 * 1024**2 + 3 * 1024 * 4096
    dense = patches * (588 * 1024 + 24 * layer) + 484 * (4096 * 1024 + 1024 * 4096 + 4096**2)
    assert sum(work.operations for work in works) == 2 * dense + 24 * 4 * patches**2 * 1024
    assert sum(work.calls for work in works) == 4 + 24 * 5
    weights = 2 * (588 * 1024 + 24 * layer + 4096 * 1024 + 1024 * 4096 + 4096**2)
    assert weights < sum(work.num_bytes for work in works) < weights + 2 * patches * 24 * 30 * 1024
    assert planned_model_config("small4", text_only=True) == named_model_config("small4")


def test_prices_of_images_are_near_the_model_s() -> None:
    config = resolve(EngineOptions(model="small4", device="simulated:h200", weights="nvfp4"))
    assert config.card is not None
    model = StepModel(config, config.card)
    cost = fitted_cost(config, model)
    for embeddings in (256, 484, 1369, 3025):
        assert cost.image_s(embeddings) == pytest.approx(model.image_s(embeddings), rel=0.25)
    text = resolve(EngineOptions(model="small4", device="simulated:h200", weights="nvfp4", text_only=True))
    assert text.card is not None
    assert fitted_cost(text, StepModel(text, text.card)).image_s(100) == 0

"""`cierzo info` says before anything is loaded what is in a folder, which tokenizer speaks, what it needs, and what
is refused."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from header_folders import VISION, write_headers
from published import SMALL3, SMALL4, Published
from safetensors.torch import save_file
from tekken_folders import tekken, write_tekken
from word_folders import byte_level

from cierzo.bench.plan.search import LatencyLimits, Planner
from cierzo.bench.workload import parse_workload
from cierzo.cli import main
from cierzo.engine import LLM, requirements
from cierzo.engine.checkpoint_report import CheckpointReport, report
from cierzo.engine.config import EngineOptions, resolve
from cierzo.engine.errors import CheckpointError, ConfigError
from cierzo.engine.launch import load_prompts
from cierzo.engine.model.build import parameter_specs
from cierzo.engine.text.facts import read_words

TEKKEN: dict[str, Any] = {  # as far as it is no vocabulary; of Small 4
    "config": {"version": "v15", "default_vocab_size": 131072, "default_num_special_tokens": 1000},
    "vocab": [{"rank": 0, "token_bytes": "AA==", "token_str": None}],
    "special_tokens": [
        {"rank": rank, "token_str": text, "is_control": True}
        for rank, text in enumerate(
            ("<unk>", "<s>", "</s>", "[INST]", "[TOOL_CALLS]", "[THINK]", "[/THINK]", "[SUFFIX]")
        )
    ],
    "model_settings_builder": {"reasoning_effort": {"values": ["none", "high"], "default": "none"}},
}
TOKENIZER = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 190, "content": "<s>"}]}


@pytest.fixture(scope="module")
def small4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small 4's NVFP4 folder as it is published, vision tower and all, but for the data."""
    folder = write_headers(tmp_path_factory.mktemp("small4"), "small4", "native-nvfp4", shards=13, vision=True)
    return write_tekken(folder, full=True)


@pytest.fixture(scope="module")
def told(small4: Path) -> CheckpointReport:
    return report(small4, parameter_specs)


def rows(found: object) -> dict[str, str]:
    """The text beside each label; a line without one belongs to the label above."""
    said: dict[str, str] = {}
    for line in str(found).splitlines():
        label = line[:18].strip() if not line.startswith("refused: ") else "refused"
        label = label or list(said)[-1]
        said[label] = f"{said[label]} {line[18:]}" if label in said else line[18:]
    return said


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


# --- what is in it


def test_the_published_nvfp4_folder_has_the_published_sums(told: CheckpointReport) -> None:
    checkpoint = told.checkpoint
    assert (checkpoint.num_tensors, checkpoint.num_shards) == (56_313, 13)
    assert checkpoint.num_bytes == 70_801_959_560
    assert checkpoint.parameters == 119_401_298_944
    assert checkpoint.activation_scales == 36 * 129 * 3
    assert told.refused == ()


def test_the_fp8_folder_has_as_many_values_as_published(tmp_path: Path) -> None:
    found = report(write_headers(tmp_path, "small4", "hf-fp8", vision=True), parameter_specs)
    values = sum(size // {"F8_E4M3": 1, "BF16": 2}[dtype] for dtype, size in found.checkpoint.stored.items())
    assert values == 119_401_317_952
    assert found.refused == ()


def test_pitfall_11_a_folder_without_config_json(small4: Path, told: CheckpointReport) -> None:
    assert not (small4 / "config.json").exists()
    said = rows(told)
    assert said["architecture"] == "mistral4"
    assert said["format"] == "Mistral-native, NVFP4 (compressed-tensors), experts only"
    assert said["tokenizer"] == "tekken.json v15, read by mistral-common: 131,072 tokens for the model's 131,072"


def test_pitfall_18_the_cache_is_sized_by_latents_and_not_by_heads(told: CheckpointReport) -> None:
    assert told.checkpoint.kv_bytes_per_token == 23_040
    assert told.needs is not None
    assert told.needs.request_tokens == 262_144
    assert told.needs.request_bytes == {"bf16": 6_039_797_760, "fp8": 3_019_898_880}


def test_a_vision_tower_is_told_of(told: CheckpointReport) -> None:
    assert (told.checkpoint.vision_tensors, told.checkpoint.vision_bytes) == (VISION, 856_944_640)
    sizes = "24 layers, hidden size 1,024, 16 heads; a token for 28 x 28 px, images of up to 1,540 px a side"
    expected = f"{sizes}; 222 tensors, 856.9 MB (--text-only leaves them aside)"
    assert rows(told)["vision tower"] == expected


def test_a_vision_tower_that_is_left_aside_is_said_loudly_and_takes_no_memory(
    small4: Path, told: CheckpointReport
) -> None:
    found = report(small4, parameter_specs, text_only=True)
    assert rows(found)["vision tower"] == "images are not served: 222 tensors, 856.9 MB, are left aside"
    assert told.needs is not None
    assert found.needs is not None
    both = zip(told.needs.cards, found.needs.cards, strict=True)
    assert {seeing.weight_bytes - blind.weight_bytes for seeing, blind in both} == {856_944_640}
    assert "109,440 tokens" in rows(found)["nvfp4"]


def test_a_folder_with_both_layouts_says_which_is_read(tmp_path: Path) -> None:
    Published(SMALL4, "native-fp8", seed=7).write(Published(SMALL4, "hf-fp8").write(tmp_path))
    found = report(tmp_path, parameter_specs)
    assert rows(found)["layouts"] == "Hugging Face and Mistral-native; Hugging Face is read, the other left aside"
    assert rows(found)["format"].startswith("Hugging Face")
    (tmp_path / "config.json").unlink()
    assert report(tmp_path, parameter_specs).checkpoint.layouts == ("Mistral-native",)
    assert "layouts" not in rows(report(tmp_path))


def test_it_is_quick(small4: Path) -> None:
    """CPU time in proportion to that of decoding the headers' JSON, so that a slow machine does not fail it: 14
    times as much, 0.9 s where this was written. Without its tokenizer, whose library takes as long again."""
    files = [*small4.glob("*.safetensors"), *small4.glob("*.index.json")]
    texts = [file.read_bytes() for file in files if file.suffix == ".json"]
    for file in files:
        with file.open("rb") as stream:
            if file.suffix == ".safetensors":
                texts.append(stream.read(int.from_bytes(stream.read(8), "little")))

    def seconds(work: Callable[[], object]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    base = min(seconds(lambda: [json.loads(text) for text in texts]) for _ in range(3))
    assert min(seconds(lambda: report(small4, parameter_specs, "tokenizers")) for _ in range(3)) < 35 * base


# --- which tokenizer speaks


def test_tekken_wins_and_the_other_is_named(tmp_path: Path) -> None:
    write(tmp_path / "tekken.json", TEKKEN)
    write(tmp_path / "tokenizer.json", TOKENIZER)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    words = read_words(tmp_path)
    said = dict(words.rows(131_072))
    assert words.unused == ("tokenizer.json",)
    assert said["chat"] == "mistral-common, thinking, tool calls, fill in the middle"
    assert words.efforts == ("none", "high")
    assert "reasoning_effort none or high" in said.values()


def test_an_older_tekken_has_no_efforts(tmp_path: Path) -> None:
    write(tmp_path / "tekken.json", {"config": {"version": "v7", "default_vocab_size": 131072}, "vocab": []})
    words = read_words(tmp_path)
    assert (words.version, words.efforts) == ("v7", ())
    assert (words.chat, words.abilities) == ("mistral-common", ("tool calls", "fill in the middle"))


def test_a_tekken_without_the_markers_of_chats_has_none(tmp_path: Path) -> None:
    special = [{"rank": 0, "token_str": "<unk>", "is_control": True}]
    write(
        tmp_path / "tekken.json",
        {"config": {"version": "v7", "default_vocab_size": 272}, "special_tokens": special},
    )
    words = read_words(tmp_path)
    assert (words.chat, words.num_tokens) == ("", 272)


@pytest.mark.parametrize(
    ("file", "origin"),
    [
        ("chat_template.jinja", "chat_template.jinja"),
        ("tokenizer_config.json", "tokenizer_config.json"),
        ("chat_template.json", "chat_template.json"),
    ],
)
def test_a_template_is_named_with_what_it_knows(tmp_path: Path, file: str, origin: str) -> None:
    template = "{% if reasoning_effort %}<think>{% endif %}{{ messages }}"
    write(tmp_path / "tokenizer.json", TOKENIZER)
    if file.endswith(".jinja"):
        (tmp_path / file).write_text(template)
    else:
        write(tmp_path / file, {"chat_template": template})
    words = read_words(tmp_path)
    assert (words.chat, words.abilities, words.efforts) == (origin, ("thinking",), None)
    assert (
        dict(words.rows(192))["tokenizer"] == "tokenizer.json, read by tokenizers: 191 tokens for the model's 192"
    )


def test_a_tokenizer_without_a_template(tmp_path: Path) -> None:
    write(tmp_path / "tokenizer.json", TOKENIZER)
    words = read_words(tmp_path)
    assert dict(words.rows(192))["chat"] == "none: prompts are texts or token ids"


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    assert list(read_words(tmp_path).rows(192)) == [("tokenizer", "none: prompts are token ids")]


# --- what it needs


def test_cards_are_those_that_the_engine_would_start_on(small4: Path, told: CheckpointReport) -> None:
    """The engine starts with the settings that `info` names, and on a card fewer it does not."""
    assert told.needs is not None
    fits = {need.weights: need.fits for need in told.needs.cards}
    assert {name: [fit.device for fit in found] for name, found in fits.items()} == {
        "bf16": ["4xh100", "2xh200"],
        "fp8": ["2xh100", "h200"],
        "nvfp4": ["h100", "2xh100", "h200"],
    }

    def starts(device: str, weights: Any, tokens: int) -> bool:
        options = EngineOptions(
            model=str(small4), device=f"simulated:{device}", weights=weights, max_model_len=tokens
        )
        try:
            return resolve(options).scheduler.max_model_len == tokens
        except ConfigError:
            return False

    longest = told.needs.request_tokens
    for weights, found in fits.items():
        for fit in found:
            assert starts(fit.device, weights, fit.max_model_len)
            assert fit.max_model_len == longest or not starts(fit.device, weights, fit.max_model_len + 32)
    assert not starts("2xh100", "bf16", longest)
    assert not starts("h100", "fp8", 1)
    assert not starts("h200", "bf16", 1)
    assert "72,256 tokens" in rows(told)["nvfp4"]


def test_weights_are_those_of_the_planner(small4: Path, told: CheckpointReport) -> None:
    options = EngineOptions(model=str(small4), weights="fp8")
    plan = Planner(options, parse_workload("9/9@1"), LatencyLimits()).plan("h200", changes=False)
    assert told.needs is not None
    assert plan.weight_gb == {need.weights: need.weight_bytes for need in told.needs.cards}["fp8"] / 1e9


def test_needs_are_told_in_words_and_units_of_their_size(told: CheckpointReport) -> None:
    said = rows(told)
    assert told.needs is not None
    host = msgspec.structs.replace(told.needs.host[0], weight_bytes=1_234_567, kv_bytes=4_050_000_001, fits=True)
    needs = msgspec.structs.replace(told.needs, free_bytes=15_999_999_999, host=(host,))
    small = dict(needs.rows())
    assert said["longest request"] == ("262,144 tokens; the KV cache of one takes 6.04 GB in bf16, 3.02 GB in fp8")
    assert "KV cache of all requests together unless --kv-cache-gib says otherwise (15.9 GB" in small["on this CPU"]
    assert small[f"  {host.weights}"] == "1.24 MB of weights, 4.06 GB of cache: fits"
    assert said["tensors"] == "56,313 in 13 file(s), 70.8 GB"
    assert said["activations"].startswith("13,932 scales of them are stored: used only with --weights fp8 --activ")


def test_this_machine_fits_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Published(SMALL3, "hf").write(tmp_path)
    found = report(folder).needs
    assert found is not None
    (bf16,) = (host for host in found.host if host.weights == "bf16")
    assert bf16.fits
    config = resolve(EngineOptions(model=str(folder)))
    assert bf16.kv_bytes == config.cache.num_blocks * config.layout.bytes_per_block
    for spare, fits in ((0, True), (-1, False)):
        room = bf16.weight_bytes + bf16.kv_bytes + spare
        monkeypatch.setattr(requirements, "available_memory_bytes", lambda room=room: room)
        needs = requirements.needs_of(folder, report(folder).checkpoint.model)  # type: ignore[arg-type]
        assert needs.host[0].fits is fits


def test_a_model_that_says_no_length_is_planned_with_the_longest_served(tmp_path: Path) -> None:
    model = Published(SMALL3, "native")
    del model.config["max_position_embeddings"]
    found = report(model.write(tmp_path), parameter_specs)
    assert found.refused == ()
    assert rows(found)["positions"] == "not said: max_model_len must be given"
    assert found.needs is not None
    assert found.needs.request_tokens == 262_144
    assert all(host.kv_bytes for host in found.needs.host)


# --- what is refused


def unknown_quantisation(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", config | {"quantization_config": {"quant_method": "awq"}})
    return "quantization_config.quant_method is 'awq'"


def a_tensor_short(folder: Path) -> str:
    model = Published(SMALL3, "hf")
    del model.stored["language_model.lm_head.weight"]
    model.write(folder)
    return "tensor lm_head.weight is missing"


def a_tensor_more(folder: Path) -> str:
    model = Published(SMALL3, "hf")
    model.stored["eagle_linear.weight"] = torch.ones(2, 2)
    model.write(folder)
    return "tensor eagle_linear.weight has no place in this model"


def a_broken_shard(folder: Path) -> str:
    (folder / "model.safetensors").write_bytes(b"short")
    return "is truncated: 5 bytes"


def an_unknown_model(folder: Path) -> str:
    write(folder / "config.json", {"model_type": "mamba"})
    return "model_type is 'mamba'"


def no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "it has neither config.json nor params.json"


def an_adapter(folder: Path) -> str:
    for file in folder.iterdir():
        file.unlink()
    write(folder / "adapter_config.json", {"base_model_name_or_path": "example/Base"})
    save_file({"lora_A": torch.ones(2)}, folder / "adapter_model.safetensors")
    return "holds an adapter of the base model example/Base"


def a_broken_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").write_text("{")
    return "tokenizer.json cannot be read"


def a_tokenizer_too_large(folder: Path) -> str:
    num_tokens = tekken("v15")["config"]["default_vocab_size"]
    write_tekken(folder)
    return f"tekken.json is not this model's: it has {num_tokens} tokens, the model 192"


def an_unknown_tekken(folder: Path) -> str:
    write_tekken(folder, config=tekken("v15")["config"] | {"version": "v99"})
    return "tekken.json cannot be read: ValueError: Unknown version: v99"


def a_broken_tekken(folder: Path) -> str:
    (folder / "tekken.json").write_text("{")
    return "tekken.json cannot be read: JSONDecodeError: "


def an_empty_tokenizer(folder: Path) -> str:
    write(folder / "tokenizer.json", {})
    return "tokenizer.json cannot be read: "


def a_broken_template(folder: Path) -> str:
    byte_level().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{% for %}")
    return "chat template"


def a_pointer_for_tekken(folder: Path) -> str:
    (folder / "tekken.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2\n")
    return "tekken.json is a pointer of git-lfs"


def a_pointer_for_a_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2\n")
    return "tokenizer.json is a pointer of git-lfs"


REFUSED = (
    *(unknown_quantisation, a_tensor_short, a_tensor_more, a_broken_shard, an_unknown_model, no_config),
    *(an_adapter, a_broken_tokenizer, a_tokenizer_too_large, an_unknown_tekken, a_broken_tekken),
    *(an_empty_tokenizer, a_broken_template, a_pointer_for_tekken, a_pointer_for_a_tokenizer),
)


def as_served(folder: Path, tokenizer: Any = "auto") -> str:
    """The words in which an engine refuses to start with a folder."""
    with pytest.raises(CheckpointError) as caught:
        LLM(folder, tokenizer=tokenizer, threads=1, max_model_len=128, kv_cache_gib=0.02, block_tokens=8)
    return caught.value.message


@pytest.mark.parametrize("spoil", REFUSED)
def test_a_refused_folder_prints_its_facts_and_why(
    spoil: Callable[[Path], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Published(SMALL3, "hf").write(tmp_path)
    why = spoil(folder)
    assert main(["info", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    refusals = [line for line in out.splitlines() if line.startswith("refused: ")]
    assert len(refusals) == 1
    assert why in refusals[0]
    assert refusals[0] == f"refused: {as_served(folder)}"
    if spoil is not an_adapter and spoil is not a_broken_shard:
        assert "23 in 1 file(s)" in out or "22 in 1 file(s)" in out or "24 in 1 file(s)" in out
    if REFUSED.index(spoil) > REFUSED.index(an_adapter) or spoil in (a_tensor_short, a_tensor_more, a_broken_shard):
        assert "architecture      mistral\n" in out
        assert "on GPUs" in out


def test_two_things_wrong_are_both_told(tmp_path: Path) -> None:
    folder = Published(SMALL3, "hf").write(tmp_path)
    expected = [a_broken_shard(folder), a_broken_tokenizer(folder)]
    found = report(folder, parameter_specs).refused
    assert len(found) == 2
    assert all(why in said for why, said in zip(expected, found, strict=True))


@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    folder = Published(SMALL3, "hf").write(tmp_path)
    byte_level().save(str(folder / "tokenizer.json"))
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert report(folder).refused == (f"{folder / name} is no file, or a link to none",)


def test_a_tokenizer_that_is_refused_is_not_called_none(tmp_path: Path) -> None:
    folder = Published(SMALL3, "hf").write(tmp_path)
    a_broken_tekken(folder)
    assert rows(report(folder))["tokenizer"] == "tekken.json, read by mistral-common: REFUSED, see below"


@pytest.mark.parametrize(("asked", "there"), [("tokenizers", "tekken.json"), ("mistral", "tokenizer.json")])
def test_a_setting_that_names_a_tokenizer_needs_its_file(
    asked: str, there: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Published(SMALL3, "hf").write(tmp_path)
    byte_level().save(str(folder / "tokenizer.json"))
    write_tekken(folder)
    (folder / {"tekken.json": "tokenizer.json", "tokenizer.json": "tekken.json"}[there]).unlink()
    assert main(["info", str(folder), "--tokenizer", asked]) == 1
    said = as_served(folder, asked)
    assert said.startswith(f"tokenizer is {asked}, which reads ")
    assert capsys.readouterr().out.endswith(f"\nrefused: {said}\n")


def test_a_setting_chooses_the_tokenizer_that_is_told(tmp_path: Path) -> None:
    folder = Published(SMALL3, "hf").write(tmp_path)
    byte_level().save(str(folder / "tokenizer.json"))
    a_broken_tekken(folder)
    found = report(folder, parameter_specs, "tokenizers")
    assert (found.words.file, found.words.unused) == ("tokenizer.json", ("tekken.json",))


def test_what_a_server_warns_of_is_noted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Published(SMALL3, "hf").write(tmp_path)
    byte_level().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content | lower }}{% endfor %}")
    load_prompts(resolve(EngineOptions(model=str(folder))))
    (warned,) = (text for text in caplog.messages if "chat template" in text)
    main(["info", str(folder)])
    assert f"\nnote: {warned}\n" in capsys.readouterr().out


def test_a_tekken_that_writes_no_conversation_is_told_to_have_no_chat(tmp_path: Path) -> None:
    write_tekken(tmp_path, special_tokens=tekken("v13")["special_tokens"])
    found = report(tmp_path)
    assert "text is served, conversations are not" in found.notes[0]
    assert (found.words.chat, found.words.abilities, found.words.efforts) == ("", (), ())


def test_json_for_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Published(SMALL4, "hf-fp8").write(tmp_path)
    assert main(["info", "--json", str(folder)]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    found, expected = msgspec.json.decode(out, type=CheckpointReport), report(folder, parameter_specs)
    assert found.checkpoint == expected.checkpoint
    assert found.words == expected.words
    assert found.needs is not None
    assert expected.needs is not None
    assert found.needs.cards == expected.needs.cards

"""Wrong command lines: one line on stderr that names what was given, an exit status, and never a traceback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cierzo import cli
from cierzo.cli import main
from cierzo.engine.commands import info
from cierzo.engine.errors import CoreFailed, InvalidRequest, ProtocolError
from cierzo.engine.llm import LLM, Output, SampleOutput
from cierzo.engine.messages import Usage
from cierzo.engine.weights.make import make_checkpoint

DEADLINE_S = 60
PARSER = cli.build_parser()
NO_FOLDER = "checkpoint must be the folder of a checkpoint, got "
NO_ADDRESS = "address must be HOST:PORT or unix:PATH (ports up to 65535, paths up to 107 bytes), got "
SEED = "argument --seed: must be an integer from 0 to 9223372036854775807, got "
COUNT = "must be an integer from 1 to 1048576, got "
POSITIVE = "must be an integer of at least 1, got "
NUMBER = "must be a finite number above 0, got "
PLAN = ("plan", "small4", "--device", "h200", "--workload")
LOAD = ("bench", "load", "--rpc", "unix:{tmp}/none")
GENERATE = ("generate", "{dense}", "--token-ids", "1")
MAKE = ("make-checkpoint", "{tmp}/new", "--like", "small3")
STEP = ("bench", "step", "--running", "1", "--contexts", "64", "--steps", "1")

WRONG: list[tuple[tuple[str, ...], int, str]] = [
    # commands
    ((), 2, "the following arguments are required: COMMAND"),
    (("frob",), 2, "invalid choice: 'frob'"),
    (("bench", "frob"), 2, "invalid choice: 'frob'"),
    (("info", "{dense}", "extra"), 2, "unrecognized arguments: extra"),
    # a folder that is not there, in the same words everywhere
    *(
        ((*before, folder, *after), 2, f"{NO_FOLDER}'{folder}'")
        for folder in ("", "{tmp}/none", "{tmp}/file", "caf\udce9")
        for before, after in (
            (("info",), ()),
            (("serve",), ()),
            (("generate",), ("--token-ids", "1")),
            (("plan",), ("--device", "h200", "--workload", "9/9@1")),
            (("bench", "experts"), ()),
            (("bench", "step", "--profile"), ()),
        )
    ),
    (("serve", "{tmp}/empty"), 1, "is no checkpoint: it has neither config.json nor params.json: it is empty"),
    # addresses, refused before the settings are printed
    *(
        (
            (*command, "--rpc", address),
            2,
            f"{NO_ADDRESS}'{address}'",
        )
        for address in ("foo", "", ":1", "host:99999", "unix:", "a..b:80", "unix:" + "x" * 108, "unix:caf\udce9")
        for command in (("serve", "{dense}"), ("chat", "--message", "x"), ("bench", "load"), ("bench", "experts"))
    ),
    (("serve", "{dense}", "--rpc", "unix:{tmp}/none/x"), 2, "cannot listen on unix:{tmp}/none/x: No such file"),
    (("serve", "{dense}", "--rpc", "unix:{tmp}/file"), 2, "the file exists and is no socket"),
    (("chat", "--rpc", "unix:{tmp}/none", "--message", "x"), 1, "no server answers at unix:{tmp}/none"),
    (LOAD, 1, "no server answers at unix:{tmp}/none"),
    (("bench", "experts", "--rpc", "unix:{tmp}/none"), 1, "no server answers at unix:{tmp}/none"),
    # settings of the engine
    ((*GENERATE, "--threads", "100000"), 2, "argument --threads: must be an integer from 1 to 1024, got '100000'"),
    ((*GENERATE, "--threads", "0"), 2, "argument --threads: must be an integer from 1 to 1024, got '0'"),
    ((*GENERATE, "--threads", "x"), 2, "argument --threads: must be an integer from 1 to 1024, got 'x'"),
    ((*GENERATE, "--kv-cache-gib", "-1"), 2, f"argument --kv-cache-gib: {NUMBER}'-1'"),
    ((*GENERATE, "--kv-cache-gib", "nan"), 2, f"argument --kv-cache-gib: {NUMBER}'nan'"),
    ((*GENERATE, "--kv-cache-gib", "inf"), 2, f"argument --kv-cache-gib: {NUMBER}'inf'"),
    ((*GENERATE, "--kv-cache-gib", "1e9"), 2, "(GiB of memory that are free), got 1000000000.0"),
    ((*GENERATE, "--max-model-len", "0"), 2, f"argument --max-model-len: {POSITIVE}'0'"),
    ((*GENERATE, "--max-model-len", "200000"), 2, "max_model_len must be at most 131072"),
    ((*GENERATE, "--max-model-len", str(2**70)), 2, f"must be an integer of at most {2**63 - 1}, got '{2**70}'"),
    ((*GENERATE, "--block-tokens", "-4"), 2, f"argument --block-tokens: {COUNT}'-4'"),
    ((*GENERATE, "--budget-tokens", "0"), 2, f"argument --budget-tokens: {COUNT}'0'"),
    ((*GENERATE, "--max-running", "5000"), 2, "max_running must be at most 1024 (budget_tokens"),
    ((*GENERATE, "--graph-sequences", "-1"), 2, "argument --graph-sequences: must be an integer from 0 to"),
    ((*GENERATE, "--softmax-scale", "0"), 2, f"argument --softmax-scale: {NUMBER}'0'"),
    ((*GENERATE, "--dtype", "float16"), 2, "argument --dtype: invalid choice: 'float16'"),
    ((*GENERATE, "--device", "gpu"), 2, "device must be auto, cpu, cuda or simulated:NAME, got 'gpu'"),
    ((*GENERATE, "--device", "simulated:x"), 2, "device must be h100, h200, several as in 4xh100, or a JSON file"),
    (
        (*GENERATE, "--device", "simulated:{tmp}/list.json"),
        2,
        "must be a JSON file that describes a device (Expected",
    ),
    *(
        ((*GENERATE, *words, "--device", f"simulated:{{tmp}}/{name}.json"), 2, f"device {told}")
        for name, words, told in (
            (
                "bare",
                (),
                "must be a JSON file that describes a device (stated, operations_per_s: there must be attention",
            ),
            (
                "bf16",
                ("--weights", "fp8", "--activations", "fp8"),
                "must be one whose operations_per_s tells fp8 (it",
            ),
        )
    ),
    (
        (*GENERATE, "--dtype", "float32", "--device", "simulated:h200"),
        2,
        "must be one whose operations_per_s tells fp32",
    ),
    ((*GENERATE, "--weights", "fp8"), 2, "(fp8 has no kernels on a CPU), got 'fp8'"),
    ((*GENERATE, "--activations", "fp8"), 2, "(fp8 needs device cuda, not cpu), got 'fp8'"),
    ((*GENERATE, "--expert-statistics"), 2, "has no experts), got True"),
    (("serve", "{dense}", "--max-connections", "0"), 2, f"argument --max-connections: {POSITIVE}'0'"),
    (("serve", "{dense}", "--max-connections", "99999999"), 2, "max_connections must be at most "),
    (("serve", "{dense}", "--handshake-timeout-s", "0"), 2, f"argument --handshake-timeout-s: {NUMBER}'0'"),
    # prompts and sampling
    (("generate", "{dense}"), 2, "one of the arguments --prompt --message --token-ids is required"),
    (
        ("generate", "{dense}", "--prompt", "caf\udce9"),
        2,
        "--prompt: must be text in UTF-8, got 'caf\udce9'",
    ),
    (("generate", "{dense}", "--message", "caf\udce9"), 2, "argument --message: must be text in UTF-8"),
    ((*GENERATE, "--reasoning-effort", "high"), 2, "reasoning_effort must be with --message, got 'high'"),
    ((*GENERATE, "--image", "x"), 2, "image must be with --message, got 'x'"),
    (("generate", "{dense}", "--message", "x", "--image", "{tmp}/none"), 2, "image must be a file that can"),
    ((*GENERATE, "--suffix", "x"), 2, "suffix must be with --prompt, got 'x'"),
    (("generate", "{dense}", "--message", "x", "--suffix", ""), 2, "suffix must be with --prompt, got ''"),
    (("chat", "--message", "caf\udce9"), 2, "argument --message: must be text in UTF-8, got 'caf\udce9'"),
    (("chat", "--system", "caf\udce9"), 2, "argument --system: must be text in UTF-8"),
    (("demo", "--prompt", "caf\udce9"), 2, "argument --prompt: must be text in UTF-8"),
    ((*LOAD, "--prompt", "caf\udce9"), 2, "argument --prompt: must be text in UTF-8"),
    ((*GENERATE, "--stop", "caf\udce9"), 2, "argument --stop: must be text in UTF-8"),
    ((*GENERATE, "--temperature", "nan"), 2, "argument --temperature: must be a finite number, got 'nan'"),
    ((*GENERATE, "--max-tokens", "x"), 2, "argument --max-tokens: must be an integer, got 'x'"),
    *(
        (("generate", "{dense}", f"--token-ids={ids}"), 2, f"must be token ids separated by commas, got '{ids}'")
        for ids in ("", "x", "1,,2", "-1", "1.5", "1 2")
    ),
    # seeds, alike everywhere
    *(
        ((*command, "--seed", value), 2, f"{SEED}'{value}'")
        for value in ("-1", "x", "1.5", str(2**63), str(2**64))
        for command in (GENERATE, MAKE, LOAD, ("chat",), ("bench", "experts", "{sparse}"))
    ),
    # make-checkpoint
    (
        ("make-checkpoint", "", "--like", "small3"),
        2,
        "FOLDER must be the path of a folder that does not exist",
    ),
    (("make-checkpoint", "{dense}", "--like", "small3"), 1, "exists already (--overwrite replaces it)"),
    (("make-checkpoint", "{tmp}/file/new", "--like", "small3"), 1, "file: File exists"),
    ((*MAKE, "--scale", "0"), 2, "scale must be tiny, mini, full or a number in (0, 1], got '0'"),
    ((*MAKE, "--scale", "x"), 2, "scale must be tiny, mini, full or a number in (0, 1], got 'x'"),
    ((*MAKE, "--checkpoint-format", "native-nvfp4"), 2, "like must be small4 (it is experts that are NVFP4"),
    (
        (*MAKE, "--checkpoint-format", "hf-fp8", "--dtype", "float32"),
        2,
        "dtype must be bfloat16 (checkpoint_",
    ),
    # plan
    ((*PLAN, "9"), 2, "workload must be IN/OUT@CLIENTS"),
    ((*PLAN, "9/9@0"), 2, "concurrency must be an integer of at least 1, got 0"),
    ((*PLAN, "9/9@0/s"), 2, "rate must be a finite number from 1e-06 to 1000000000.0, got 0.0"),
    ((*PLAN, "9:9/9@1"), 2, "shared_tokens must be 0 to 8, got 9"),
    ((*PLAN, "{tmp}/list.json"), 2, "workload {tmp}/list.json, line 1: Expected `object`, got `array`"),
    ((*PLAN, "9/9@1", "--expert-statistics"), 2, "unrecognized arguments: --expert-statistics"),
    (
        (*PLAN, "{tmp}/trace.jsonl", "--png", "{tmp}/new"),
        2,
        "png must be left out (a trace has no number of clients",
    ),
    ((*PLAN, "9/9@1", "--max-ttft-ms", "0"), 2, f"argument --max-ttft-ms: {NUMBER}'0'"),
    ((*PLAN, "9/9@1", "--threads", "0"), 2, "argument --threads: must be an integer from 1 to 1024, got '0'"),
    ((*PLAN, "9/9@1", "--experts", "{tmp}/none"), 2, "expert statistics {tmp}/none: "),
    ((*PLAN, "9/9@1", "--json", "{tmp}/none/x"), 2, "{tmp}/none/x cannot be written"),
    ((*PLAN, "9/9@1", "--calibration", "{tmp}/none"), 2, "calibration must be left out (it is for device cpu"),
    (
        ("plan", "small4", "--device", "{tmp}/bare.json", "--workload", "9/9@1"),
        2,
        "there must be attention, experts, memory",
    ),
    *(
        (
            ("plan", "{sparse}", "--device", "cpu", "--workload", "9/9@1", "--calibration", "{tmp}/" + name),
            2,
            "calibration must be a file that cierzo.bench.plan.calibrate has written ("
            + why
            + "), got '{tmp}/"
            + name,
        )
        for name, why in (
            ("none", "No such file or directory"),
            ("empty", "Is a directory"),
            ("file", "Input data was truncated"),
            ("list.json", "Expected `object`, got `array`"),
        )
    ),
    # bench
    ((*LOAD, "--requests", "0"), 2, f"argument --requests: {POSITIVE}'0'"),
    ((*LOAD, "--rate", "0"), 2, "argument --rate: must be a finite number from 1e-06 to 1000000000.0, got '0'"),
    ((*LOAD, "--shared-tokens", "-1"), 2, "argument --shared-tokens: must be an integer of at least 0, got '-1'"),
    ((*LOAD, "--json", "{tmp}/none/x"), 2, "{tmp}/none/x cannot be written"),
    ((*STEP, "--output-tokens", "0"), 2, f"argument --output-tokens: {COUNT}'0'"),
    (("bench", "step", "--running", "0"), 2, f"argument --running: {COUNT}'0'"),
    *(
        (("bench", "step", "--contexts", "64", tokens), 2, f"must be an integer from 2 to 1048576, got '{tokens}'")
        for tokens in ("1", "99999999999")
    ),
    (("bench", "step", "--profile", "{dense}", "--batches", "--prompts"), 2, "needs --batches or --prompts, else"),
    (("bench", "step", "--steps", "-1"), 2, f"argument --steps: {POSITIVE}'-1'"),
    (("bench", "step", "--batches", "0"), 2, f"argument --batches: {COUNT}'0'"),
    ((*STEP, "--json", "{tmp}/none/x"), 2, "{tmp}/none/x cannot be written"),
    (("bench", "experts", "{sparse}", "--prompts", "{tmp}/none"), 2, "prompts {tmp}/none: [Errno 2] No such file"),
    (("bench", "experts", "{dense}"), 2, "has no experts), got True"),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("cli")
    kinds = {"dense": "small3", "sparse": "small4"}
    return {name: str(make_checkpoint(folder / name, like=like)) for name, like in kinds.items()}


@pytest.mark.parametrize(("words", "status", "told"), WRONG)
def test_a_wrong_command_line_is_told_in_one_line(
    words: tuple[str, ...],
    status: int,
    told: str,
    checkpoints: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "build_parser", lambda: PARSER)  # the same for all, which is quicker
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "trace.jsonl").write_text('{"arrival_s": 0, "input_tokens": 9, "output_tokens": 9}')
    monkeypatch.setitem(sys.modules, "matplotlib", ModuleType("matplotlib"))
    card = {
        "name": "x",
        "source": "x",
        "bytes_per_s": 1e12,
        "operations_per_s": {"bf16": 1e15},
        "memory_bytes": 10**12,
    }
    (tmp_path / "bare.json").write_text(json.dumps({**card, "stated": {}}))
    stated = dict.fromkeys(("memory", "experts", "products", "attention"), 0.5)
    (tmp_path / "bf16.json").write_text(json.dumps({**card, "stated": stated}))
    places = {**checkpoints, "tmp": tmp_path}
    assert main([word.format(**places) for word in words]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("cierzo")
    assert err.count("\n") == 1
    assert repr(told.format(**places))[1:-1].replace("\\'", "'") in err
    assert "$." not in err
    assert not (tmp_path / "new").exists()


# --- what is not known before the run ----------------------------------------------------------------------


def test_token_ids_beyond_the_vocabulary_are_named(
    checkpoints: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    for ids, told in (
        ("1,5000,2", "token_ids holds token id 5000, outside the vocabulary of 1024"),
        (str(2**70), f"token_ids is {2**70}, allowed: -2^63 to 2^64 - 1"),
    ):
        assert main(["generate", checkpoints["dense"], "--runner", "fake", f"--token-ids={ids}"]) == 2
        assert capsys.readouterr().err == f"cierzo: invalid_request: {told}\n"


@pytest.mark.parametrize(
    ("error", "status"),
    [(InvalidRequest("no"), 2), (ProtocolError("no"), 1), (CoreFailed("no"), 1), (MemoryError("no"), 1)],
)
def test_what_was_given_wrongly_is_no_run_that_failed(
    error: Exception, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raising(_: Any) -> int:
        raise error

    monkeypatch.setattr(info, "run", raising)
    assert main(["info", "x"]) == status
    assert capsys.readouterr().err.endswith(": no\n")


def test_an_answer_that_failed_is_a_run_that_failed(
    checkpoints: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: Any, **__: Any) -> list[Output]:
        sample = SampleOutput([], "", "failed", None, None, "logits are not finite")
        return [Output([1], [sample], Usage(prompt_tokens=1, output_tokens=0, cached_tokens=0), 0)]

    monkeypatch.setattr(LLM, "generate", failing)
    assert main(["generate", checkpoints["dense"], "--runner", "fake", "--token-ids", "1"]) == 1
    assert capsys.readouterr().err == "cierzo: core_failed: logits are not finite\n"


def test_effort_and_suffix_go_with_the_prompt(
    checkpoints: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str | None, str | None]] = []

    def answer(*_: Any, **fields: Any) -> Output:
        asked.append((fields.get("reasoning_effort"), fields.get("suffix")))
        sample = SampleOutput([], "so", "stop", None, None, "")
        return Output([1], [sample], Usage(prompt_tokens=1, output_tokens=0, cached_tokens=0), 0)

    monkeypatch.setattr(LLM, "chat", answer)
    monkeypatch.setattr(LLM, "generate", lambda *words, **fields: [answer(*words, **fields)])
    generate = ["generate", checkpoints["dense"], "--runner", "fake"]
    assert main([*generate, "--message", "x", "--reasoning-effort", "high"]) == 0
    assert main([*generate, "--prompt", "x", "--suffix", "y"]) == 0
    assert main([*generate, "--message", "x"]) == 0
    assert asked == [("high", None), (None, "y"), (None, None)]


def test_paths_may_hold_bytes_that_are_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "caf\udce9.json"
    words = [
        "plan",
        "small4",
        "--device",
        "h200",
        "--workload",
        "9/9@1",
        "--weights",
        "nvfp4",
        "--json",
        str(report),
    ]
    monkeypatch.setattr(sys, "argv", ["cierzo", *words])  # which the report keeps
    assert main(words) == 0
    assert b"caf\\\\udce9.json" in report.read_bytes()
    (tmp_path / "caf\udce9").mkdir()
    make = ["make-checkpoint", str(tmp_path / "caf\udce9" / "new"), "--like", "small3"]
    assert main(make) == 0
    capsys.readouterr()
    for command in (("info",), ("serve",), ("generate", "--token-ids=1")):
        assert main([*command, make[1]]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert "checkpoint must be a folder whose path is text in UTF-8, got " in err


def test_exit_statuses_are_written_down(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Exit status: 0 done; 1 the run failed; 2 something was given wrongly" in told


def test_a_port_in_use_is_told_before_the_settings(
    checkpoints: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(tmp_path / "rpc"))
        taken.listen()
        assert main(["serve", checkpoints["dense"], "--rpc", f"unix:{tmp_path / 'rpc'}"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.endswith("another server listens there\n")


# --- the cache folder --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ("info", "demo"),
        ("serve", "demo"),
        ("generate", "demo", "--prompt", "x"),
        ("demo",),
        ("bench", "step", "--profile", "demo"),
    ],
)
def test_a_cache_folder_that_cannot_be_written_is_named(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf = pytest.importorskip("cierzo.engine.weights.gguf")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(gguf, "find_demo_gguf", lambda: tmp_path / "file")
    monkeypatch.setattr(gguf, "convert_gguf", lambda source, target, progress: target.mkdir(parents=True))
    monkeypatch.setenv("CIERZO_CACHE_DIR", str(tmp_path / "file"))
    assert main(command) == 2
    told = f"CIERZO_CACHE_DIR must be a folder that can be written (Not a directory), got '{tmp_path / 'file'}'\n"
    assert capsys.readouterr().err == f"cierzo: config_error: {told}"


@pytest.mark.parametrize(
    "command", [("info", "x"), ("chat",), ("demo",), ("plan", "small4", "--device", "h200", "--workload", "9/9@1")]
)
def test_a_relative_cache_folder_is_refused_by_every_command(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CIERZO_CACHE_DIR", "cache")
    assert main(command) == 2
    assert (
        capsys.readouterr().err == "cierzo: config_error: CIERZO_CACHE_DIR must be an absolute path, got 'cache'\n"
    )


def test_a_cache_folder_that_is_not_needed_may_be_anything(
    checkpoints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CIERZO_CACHE_DIR", str(tmp_path / "file"))
    assert main(["generate", checkpoints["dense"], "--token-ids", "1", "--max-tokens", "2"]) == 0
    out, err = capsys.readouterr()
    assert out.count(",") == 1
    assert err.endswith("[cut at its limit of tokens]\n")


# --- the process -------------------------------------------------------------------------------------------


def _run(code: str, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, in which `code` has run before anything of ours is imported."""
    hears = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"  # in the background too
    start = f"{hears}\n{code}\nfrom cierzo.__main__ import main\nsys.exit(main())"
    command = [sys.executable, "-c", start, *words]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    options = {"env": environment, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.run(command, timeout=DEADLINE_S, check=False, **options)


INTERRUPT = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
AT_IMPORT = f"""
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "{{module}}":
            {INTERRUPT}
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (AT_IMPORT.format(module="cierzo.cli"), -signal.SIGINT),
        (AT_IMPORT.format(module="argparse"), -signal.SIGINT),
        (AT_IMPORT.format(module="msgspec"), 130),
        (AT_IMPORT.format(module="cierzo.bench.load"), 130),
        (f"import atexit\n@atexit.register\ndef _():\n    {INTERRUPT}", -signal.SIGINT),
    ],
)
def test_ctrl_c_leaves_no_traceback_at_any_moment(code: str, status: int) -> None:
    done = _run(code, "bench", "load", "--help", stdout=subprocess.PIPE)
    assert done.returncode == status
    assert done.stderr == ("cierzo: interrupted\n" if status == 130 else "")


def test_an_interrupt_that_is_ignored_stays_ignored() -> None:
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)" + AT_IMPORT.format(module="cierzo.cli")
    assert _run(code, "--version", stdout=subprocess.PIPE).returncode == 0


def test_a_reader_that_is_gone_ends_the_command_in_silence(checkpoints: dict[str, str]) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = _run("", "info", checkpoints["dense"], stdout=write)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_full_disk_under_the_output_is_told(checkpoints: dict[str, str]) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = _run("", "info", checkpoints["dense"], stdout=full)
    assert (done.returncode, done.stderr) == (1, "cierzo: No space left on device\n")


def test_what_the_terminal_cannot_show_is_escaped(checkpoints: dict[str, str]) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    print_it = "import cierzo.engine.checkpoint_report as i; from types import SimpleNamespace as n\n"
    print_it += "i.report = lambda *_: type('r', (n,), {'__str__': lambda _: 'caf\xe9'})(refused=())"
    done = _run(print_it, "info", checkpoints["dense"], stdout=subprocess.PIPE, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "caf\\xe9\n", "")

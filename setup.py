"""Packages the five top-level folders as `cierzo`; src/cierzo links to each of them.

Read from the environment: CIERZO_NATIVE=0 leaves out the C++ kernels, a list (CIERZO_NATIVE=avx2,avx512) leaves out
the other instruction sets; CXX names the compiler, CXXFLAGS and LDFLAGS add to its options.
"""

import hashlib
import os
import platform
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

RUNTIME = [
    "torch>=2.11,<2.14",
    "numpy>=2.0",
    "safetensors>=0.5",
    "msgspec>=0.19",
    "uvloop>=0.21",
    "tokenizers>=0.21",
    "mistral-common>=1.13.1,<1.14",
    "llguidance>=1.9.1,<1.10",  # grammars: which tokens may come next
    "jinja2>=3.1",
    "pillow>=11",  # decodes images
    "tqdm>=4.66",
    "cryptography>=44",  # reads the times of certificates, where there is TLS
    "prometheus-client>=0.20",
]
DEMO = ["gguf>=0.17"]
BENCH = ["matplotlib>=3.8"]  # the pictures of bench/peers
GATEWAY = ["starlette>=1.0", "uvicorn>=0.50", "httptools>=0.8"]  # the HTTP door
CUDA = ["triton>=3.6", "cupy-cuda13x>=13.6"]  # what compiles and launches the kernels for GPUs
TEST = [
    "setuptools>=77",
    "pytest>=8",
    "opencv-python-headless>=4.10",  # the resizing of images is held against it
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "jsonschema>=4.20",  # judges outputs that must hold a schema
    "regex>=2024.4",  # says what may begin a match: masks of grammars are held against it
    "transformers>=5.23,<5.24",
    "compressed-tensors>=0.20,<0.21",
    "accelerate>=1.0",  # transformers refuses gguf_file= without it
    "psutil>=6",
    "trustme>=1.2",
    "pyyaml>=6",
    "selenium>=4.30",  # the page in a browser, by Debian's chromium and chromium-driver
    "basedpyright>=1.31",  # types as users of the client see them
    "triton>=3.6",  # kernels are interpreted and compiled without a GPU; torch for CUDA asks for one version of it
    "nvidia-cuda-nvrtc==13.0.*",  # compiles CUDA C++ without a GPU
    "ruff>=0.9",
    "mypy>=1.14",
    "openai>=3.50",  # the clients that people have, against the HTTP door
    "mistralai>=3.7",
    "schemathesis>=4.32,<5",  # drives the HTTP door by its OpenAPI document
]

KERNELS = Path("src/cierzo/kernels/cpu")
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
# One translation unit per instruction set; common.cpp asks the CPU which it has and runs anywhere.
INSTRUCTION_SETS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
}
# Sums keep the order in which they are written (no contraction, no reassociation). -fopenmp is for the compiler
# alone: the runtime is the one that torch brings (kernels/cpu/native.py).
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"]
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-g0"]
WITHOUT = "CIERZO_NATIVE=0 installs cierzo without its C++ kernels: plain torch only, and slow"


class BuildKernels(build_ext):
    """Compiles the instruction sets side by side, each with its own flags, and only what has changed."""

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda name: compile_object(name, folder), ["common", *wanted_sets()]))
        finished = target.with_suffix(f".{os.getpid()}")
        run_compiler("-shared", *objects, "-o", finished, *shlex.split(os.environ.get("LDFLAGS", "")))
        finished.replace(target)  # a process that has the old one mapped keeps it
        for stale in set(folder.glob("*.o")) - set(objects):
            stale.unlink(missing_ok=True)


def wanted_sets():
    """The instruction sets to build: all, unless CIERZO_NATIVE names some or none."""
    wanted = os.environ.get("CIERZO_NATIVE", "1")
    names = list(INSTRUCTION_SETS) if wanted == "1" else [] if wanted == "0" else wanted.split(",")
    for name in names:
        if name not in INSTRUCTION_SETS:
            raise SystemExit(f"error: CIERZO_NATIVE is 0, 1, or of {','.join(INSTRUCTION_SETS)}, not {wanted!r}")
    return names


def compile_object(name, folder):
    """Compile <name>.cpp, unless `folder` has an object of the same sources and command."""
    abi = hashlib.sha256((KERNELS / "abi.py").read_bytes()).hexdigest()  # common.cpp tells it: native.py compares
    arguments = [*FLAGS, *INSTRUCTION_SETS.get(name, [f'-DCIERZO_ABI="{abi}"'])]
    arguments += shlex.split(os.environ.get("CXXFLAGS", ""))
    digest = hashlib.sha256(repr((compiler(), arguments)).encode())
    for path in [KERNELS / f"{name}.cpp", *sorted(KERNELS.glob("*.h"))]:
        digest.update(path.read_bytes())
    target = folder / f"{name}-{digest.hexdigest()[:16]}.o"
    if not target.exists():
        unfinished = target.with_suffix(f".{os.getpid()}")
        run_compiler(*arguments, "-c", KERNELS / f"{name}.cpp", "-o", unfinished)
        unfinished.replace(target)
    return target


def compiler():
    """The command that compiles and links C++."""
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def run_compiler(*arguments):
    """Run it. On failure the installation ends, with a message that says what to do."""
    command = [*compiler(), *map(str, arguments)]
    try:
        done = subprocess.run(command, check=False)
    except FileNotFoundError:
        raise CompileError(
            f"\n\ncierzo's CPU kernels are C++, and there is no compiler {command[0]!r}."
            f"\nInstall g++ (Debian, Ubuntu: apt install g++), or name a compiler with CXX=.\n{WITHOUT}.\n"
        ) from None
    if done.returncode:
        raise CompileError(
            f"\n\ncierzo's CPU kernels do not compile; what {command[0]} says stands above. The command was\n"
            f"  {shlex.join(command)}\nThey are built with GCC 12, on x86-64.\n{WITHOUT}.\n"
        )


def native_kernels():
    """The C++ kernels as an extension module; none where CIERZO_NATIVE=0 says so, or on another machine."""
    if platform.machine() in ("x86_64", "AMD64") and wanted_sets():
        return [Extension("cierzo.kernels.cpu._native", [str(KERNELS / "common.cpp")])]
    for earlier in KERNELS.glob("_native*.so"):  # of an editable installation: it would still be found
        earlier.unlink()
    return []


setup(
    name="cierzo",
    version="0.1.0",
    description="A custom-kernel serving engine for Mistral Small 4",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    package_dir={"": "src"},
    packages=find_packages("src"),
    ext_modules=native_kernels(),
    cmdclass={"build_ext": BuildKernels},
    package_data={
        "cierzo": ["py.typed"],
        "cierzo.kernels.cuda": ["*.cu", "*.cuh"],
        "cierzo.engine.cost": ["*.json"],
        "cierzo.engine.gateway": ["page/*"],
    },
    install_requires=RUNTIME,
    extras_require={"cuda": CUDA, "demo": DEMO, "bench": BENCH, "gateway": GATEWAY, "test": DEMO + GATEWAY + TEST},
    entry_points={"console_scripts": ["cierzo=cierzo.__main__:main"]},
)

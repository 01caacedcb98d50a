"""Packages the five top-level folders as `cierzo`; src/cierzo links to each of them."""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

RUNTIME = [
    "torch>=2.11,<2.14",
    "numpy>=1.26",
    "safetensors>=0.5",
    "msgspec>=0.19",
    "uvloop>=0.21",
    "tokenizers>=0.21",
    "jinja2>=3.1",
    "tqdm>=4.66",
]
DEMO = ["gguf>=0.17"]
BENCH = ["matplotlib>=3.8"]  # the pictures of bench/peers
TEST = [
    "setuptools>=77",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "hypothesis>=6.100",
    "transformers>=5.23,<5.24",
    "accelerate>=1.0",  # transformers refuses gguf_file= without it
    "psutil>=6",
    "ruff>=0.9",
    "mypy>=1.14",
]

KERNELS = Path("kernels/cpu")
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
# One translation unit per instruction set; common.cpp asks the CPU which it has and runs anywhere.
FLAGS = {
    "common.cpp": [],
    "avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "avx512.cpp": AVX512,
    "avx512_bf16.cpp": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
}
# Sums keep the order in which they are written (no contraction, no reassociation). -fopenmp is for the compiler
# alone: the runtime is the one that torch brings (kernels/cpu/native.py).
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"]
COMMON += ["-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-g0"]


class BuildKernels(build_ext):
    """Compiles the instruction sets side by side, each with its own flags."""

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)

        def compile_one(source):
            return self.compiler.compile(
                [str(KERNELS / source)],
                output_dir=self.build_temp,
                extra_postargs=[*COMMON, *FLAGS[source]],
                depends=ext.depends,
            )[0]

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, FLAGS))
        self.compiler.link_shared_object(objects, str(target), target_lang="c++")


def native_kernels():
    """The C++ kernels, unless CIERZO_NATIVE=0 asks for the plain-torch reference alone, or the CPU is no x86-64."""
    if os.environ.get("CIERZO_NATIVE", "1") == "0" or platform.machine() not in ("x86_64", "AMD64"):
        return []
    sources = [str(KERNELS / source) for source in FLAGS]
    return [Extension("cierzo.kernels.cpu._native", sources, depends=[str(path) for path in KERNELS.glob("*.h")])]


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
    package_data={"cierzo": ["py.typed"]},
    install_requires=RUNTIME,
    extras_require={"demo": DEMO, "bench": BENCH, "test": DEMO + TEST},
    entry_points={"console_scripts": ["cierzo=cierzo.engine.cli:main"]},
)

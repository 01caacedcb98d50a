"""Packages the five top-level folders as `cierzo`; src/cierzo links to each of them."""

from pathlib import Path

from setuptools import find_packages, setup

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
    package_data={"cierzo": ["py.typed"]},
    install_requires=RUNTIME,
    extras_require={"demo": DEMO, "test": DEMO + TEST},
    entry_points={"console_scripts": ["cierzo=cierzo.engine.cli:main"]},
)

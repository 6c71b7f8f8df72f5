"""Packages and dependencies; exact versions stand in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

TEST = ["datasets", "mypy", "pytest", "ruff", "scikit-learn"]
BENCH = ["lm_eval"]

setup(
    name="danmu-prompt",
    version="0.1.0",
    description="Classify very short Chinese texts with large language models, and know how well",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(
        include=[
            f"{room}{below}"
            for room in ("launcher", "prompting", "data_prep", "benchmarks")
            for below in ("", ".*")
        ]
    ),
    package_data={"launcher": ["templates/*.jinja"], "data_prep": ["*.txt", "*.yaml"]},
    install_requires=[
        "accelerate",
        "deepspeed",
        "jieba",
        "jinja2",
        "matplotlib",
        "mpi4py",
        "numpy",
        "omegaconf",
        "openmpi",
        "peft",
        "psutil",
        "pyarrow",
        "pydantic",
        "pyyaml",
        "ray",
        "safetensors",
        "sentencepiece",
        "tensorboardX",
        "torch",
        "transformers",
    ],
    extras_require={"test": TEST, "bench": BENCH},
)

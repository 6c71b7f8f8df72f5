"""Packages and dependencies; exact versions stand in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

TEST = ["datasets", "hypothesis", "mypy", "pytest", "ruff", "selenium", "statsmodels"]
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
            for room in (
                "launcher",
                "prompting",
                "finetune",
                "baselines",
                "data_prep",
                "benchmarks",
            )
            for below in ("", ".*")
        ]
    ),
    package_data={
        "launcher": ["templates/*"],
        "launcher.report": ["*.yaml"],
        "data_prep": ["*.json", "*.txt", "*.yaml"],
        "data_prep.audit": ["*.jinja"],
    },
    install_requires=[
        "accelerate",
        "deepspeed",
        "httpx",
        "jieba",
        "jinja2",
        "matplotlib",
        "mpi4py",
        "numpy",
        "omegaconf",
        "openmpi",
        "optuna",
        "peft",
        "psutil",
        "pyarrow",
        "pydantic",
        "pyyaml",
        "ray[default]",
        "rensa",
        "rjieba",
        "safetensors",
        "scikit-learn",
        "scipy",
        "sentencepiece",
        "tensorboardX",
        "torch",
        "transformers",
    ],
    extras_require={"test": TEST, "bench": BENCH},
)

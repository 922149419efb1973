"""Packaging. torch comes first and deepspeed second, both outside of this file's order: `make venv` does it right."""

from setuptools import find_packages, setup

PACKAGES = ("configs", "data_pipeline", "pretrain", "finetune", "launcher")
S3_SERVER = ["moto[s3]", "flask", "flask-cors"]  # for tests; moto's own extra `server` brings a hundred packages

setup(
    name="millstream",
    version="0.1.0",
    description="Distributed pretraining: raw text in, a pretrained GPT or BERT out, fine-tuned for the task at hand",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=[f"{name}*" for name in PACKAGES]),
    package_data={"configs": ["*/*.yaml"], "launcher": ["web/*", "scripts/slurm/*.sbatch"]},
    entry_points={"console_scripts": ["millstream = launcher.cli:main"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed>=0.19",
        "transformers>=5.17",
        "datasets",
        "sentencepiece",
        "mpi4py",
        "tokenizers",
        "tiktoken",
        "numpy",
        "pyarrow",
        "zstandard",
        "orjson",
        "fsspec",
        "aiohttp",
        "xxhash",
        "ftfy",
        "resiliparse",
        "fastwarc",
        "py3langid",
        "safetensors",
        "pydantic>=2",
        "pyyaml",
        "packaging",
        "rich",
        "tensorboard",
        "matplotlib",
    ],
    extras_require={
        "s3": ["s3fs"],
        "datatrove": ["datatrove"],
        "dev": [
            "pytest",
            "pytest-xdist",
            "ruff",
            "mypy",
            "types-PyYAML",
            "hypothesis",
            "scikit-learn",
            "warcio",
            *S3_SERVER,
        ],
        "bench": ["accelerate"],
    },
)

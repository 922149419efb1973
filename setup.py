"""Packaging. torch comes first and deepspeed second, both outside of this file's order: `make venv` does it right."""

import importlib.util
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

PACKAGES = ("configs", "data_pipeline", "pretrain", "finetune", "launcher")
GENERATION = ["rouge-score", "sacrebleu"]  # scores of generated texts
S3_SERVER = ["moto[s3]", "flask", "flask-cors"]  # for tests; moto's own extra `server` brings a hundred packages


class BuildWithKernels(build_py):
    """Where nvcc is found, a package brings the CUDA kernels as a library; an editable one builds at first use."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode and shutil.which("nvcc") and importlib.util.find_spec("torch"):
            spec = importlib.util.spec_from_file_location("native", Path("pretrain/kernels/native.py"))
            native = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(native)
            folder = Path(self.build_lib, "pretrain/kernels/lib").absolute()
            native.build(folder / native.library_name(None), native.ARCHITECTURES)


setup(
    name="millstream",
    version="0.1.0",
    description="Distributed pretraining: raw text in, a pretrained GPT or BERT out, fine-tuned for the task at hand",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=[f"{name}*" for name in PACKAGES]),
    package_data={
        "configs": ["*/*.yaml"],
        "launcher": ["web/*", "scripts/slurm/*.sbatch"],
        "pretrain": ["kernels/csrc/*"],
    },
    cmdclass={"build_py": BuildWithKernels},
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
        "onnx": ["onnx", "onnxruntime", "onnxscript"],
        "gguf": ["gguf"],
        "lora": ["peft"],
        "sweep": ["optuna"],
        "generation": GENERATION,
        "dev": [
            "pytest",
            "pytest-xdist",
            "ruff",
            "mypy",
            "types-PyYAML",
            "hypothesis",
            "scikit-learn",
            "warcio",
            "onnx",
            "onnxruntime",
            "onnxscript",
            "gguf",
            "peft",
            "optuna",
            *GENERATION,
            *S3_SERVER,
        ],
        "bench": ["accelerate"],
        "harness": ["lm-eval"],
    },
)

"""Packages, dependencies and extras of megatron-lora; tool settings live in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    name="megatron-lora",
    version="0.1.0",
    description="Train many LoRA adapters at once over one frozen base model, on Megatron's tensor and pipeline parallel layers",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_lora", "megatron_lora.*", "fused_ops", "fused_ops.*", "scheduling", "scheduling.*"]),
    package_data={"fused_ops.lora.triton": ["*.json"]},
    install_requires=[
        "torch>=2.8",
        "megatron-core>=0.16.1,<0.20",
        "numpy",
        "pyyaml",
        "transformers>=5",
        "safetensors",
        "rich",
        "matplotlib",
        "tensorboard",
        "triton; platform_system == 'Linux'",
    ],
    extras_require={
        "cudnn": ["nvidia-cudnn-frontend>=1.32"],
        "dev": ["pytest", "hypothesis", "ruff", "basedpyright>=1.40,<1.41", "setuptools", "peft", "accelerate", "pyarrow", "trl==1.16.0"],
        "gguf": ["gguf", "accelerate"],
        "hub": ["datasets", "pyarrow"],
        "parquet": ["pyarrow"],
        "te": ["transformer-engine[core-cu13,pytorch]>=2.14"],  # with torch for CUDA 12: transformer-engine[core-cu12,pytorch]
        "wandb": ["wandb"],
    },
    entry_points={"console_scripts": ["megatron-lora=megatron_lora.__main__:main"]},
)

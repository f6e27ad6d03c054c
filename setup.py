"""Packaging. `conf/`, `kernels/` and `slurm/` lie beside `src/` in the tree and are packages of the same wheel.

The reason for each dependency and its bounds is in docs/dependencies.md.
"""

from pathlib import Path

from setuptools import find_packages, setup

EMBED = ["sentence-transformers>=6,<7"]
PARALLEL = ["megatron-core==0.16.1"]
SWEEP = ["hydra-submitit-launcher==1.2.0"]
TEST = [
    "hypothesis>=6,<7",
    "mypy>=1.18,<3",
    "pyarrow-stubs>=19",
    "pytest>=8,<10",
    "pytest-xdist>=3.6,<4",
    "ruff>=0.14,<0.18",
    "selenium>=4.20,<5",
    "transformers>=5.17,<6",
    "triton==3.6.0",
    "types-PyYAML",
]

setup(
    name="flexpert",
    version="0.1.0",
    description="Train the experts of one mixture-of-experts language model apart, assemble them, take any out again",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=[*find_packages("src"), *find_packages("kernels"), "flexpert.conf", "flexpert.slurm"],
    package_dir={
        "": "src",
        "flexpert_kernels": "kernels/flexpert_kernels",
        "flexpert.conf": "conf",
        "flexpert.slurm": "slurm",
    },
    package_data={
        "flexpert.conf": ["*.yaml", "*/*.yaml"],
        "flexpert.slurm": ["*.sbatch", "*.sh"],
        "flexpert": ["py.typed"],
    },
    entry_points={"console_scripts": ["flexpert = flexpert.cli:main"]},
    install_requires=[
        "hydra-core>=1.3.2,<1.4",
        "matplotlib>=3.9,<4",
        "numpy>=1.26,<2.4",
        "omegaconf>=2.3,<2.4",
        "pyarrow>=17",
        "pyyaml>=6,<7",
        "rich>=13,<16",
        "safetensors>=0.5,<1",
        "tokenizers>=0.22,<0.24",
        "torch>=2.11,<2.14",
        "zstandard>=0.22,<1",
    ],
    extras_require={
        "wandb": ["wandb>=0.19,<1"],
        "embed": EMBED,
        "parallel": PARALLEL,
        "sweep": SWEEP,
        "te": ["transformer-engine[pytorch]>=2.15,<3"],
        "test": [*TEST, *EMBED, *PARALLEL, *SWEEP, "wandb>=0.19,<1"],
    },
)

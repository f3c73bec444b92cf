"""Packaging. The folder kernels/ is installed as segmenter.kernels, never as a top-level module.

Hugging Face publishes a package whose top-level module is called `kernels`; shipping one of our own would overwrite it.
So the packages are listed by hand, kernels/ has no __init__.py (a folder without one loses to any real `kernels`
package), and git holds segmenter/kernels as a symbolic link so that the code also runs from a bare checkout.
"""

from pathlib import Path

from setuptools import setup

setup(
    name="segmenter-triton",
    version="0.1.0",
    description="Segmenter (Strudel et al., ICCV 2021): a plain ViT for semantic segmentation, exact and fast",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=[
        "segmenter",
        "segmenter.classes",
        "segmenter.cli",
        "segmenter.cli.commands",
        "segmenter.data",
        "segmenter.dropin",
        "segmenter.evaluation",
        "segmenter.export",
        "segmenter.inference",
        "segmenter.kernels",
        "segmenter.segm",
        "segmenter.segm.data",
        "segmenter.segm.eval",
        "segmenter.segm.model",
        "segmenter.segm.optim",
        "segmenter.segm.utils",
        "segmenter.training",
        "segmenter.weights",
    ],
    package_dir={"segmenter": "segmenter", "segmenter.kernels": "kernels"},
    package_data={"segmenter.classes": ["*.yml"]},
    # No version with a known flaw is admitted (tests/test_floors.py).
    install_requires=[
        "torch>=2.6",
        'triton>=3.2; platform_system == "Linux" and (platform_machine == "x86_64" or platform_machine == "aarch64")',
        "numpy>=1.24",
        "timm>=1.0.3",
        "pillow>=10.3",
        "pyyaml>=6.0.1",
        "safetensors>=0.4",
        "tqdm>=4.66.3",
    ],
    extras_require={
        # Triton's interpreter breaks with numpy 2.4 up to triton 3.6.
        "test": [
            "pytest>=9",
            "pytest-cov",
            "pytest-timeout>=2.2",
            "pytest-xdist>=3",
            "pytest-benchmark>=4",
            "hypothesis>=6.100",
            "numpy<2.4",
            "setuptools>=78.1.1",
            "ruff==0.17.6",
            "transformers>=4.48",
            "matplotlib",
            "scipy",
            "segmentation-models-pytorch",
            "onnx>=1.19.1",
            "onnxruntime",
            "onnxscript",
            "tensorboard",
        ],
        "bench": [
            "pytest>=8",
            "pytest-benchmark>=4",
            "matplotlib",
            "transformers>=4.48",
            "torchvision",
            "scipy",
            "segmentation-models-pytorch",
        ],
        "train": ["torchvision", "tensorboard", "matplotlib", "segmentation-models-pytorch"],
        "export": ["onnx>=1.19.1", "onnxruntime", "onnxscript"],
        "hub": ["huggingface_hub"],
    },
    entry_points={"console_scripts": ["segmenter=segmenter.cli:main"]},
)

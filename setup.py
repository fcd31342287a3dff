"""Packaging: the flat files of this repository become one importable package, `tqdm_seg`.

The distribution is not called "tqdm": that name belongs to the progress bar.
"""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildModules(build_py):
    """Leaves this file, which lies among the modules, out of the package."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """(package, module, file) of every module."""
        return [found for found in super().find_package_modules(package, package_dir) if found[1] != "setup"]


setup(
    name="tqdm-segmentation",
    version="0.1.0",
    description="tqdm: textual queries segment scenes never seen in training (Hugging Face Transformers)",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    package_dir={"tqdm_seg": "."},
    packages=["tqdm_seg"],
    cmdclass={"build_py": BuildModules},
    install_requires=[
        "torch>=2.10",
        "torchvision>=0.25",
        "transformers>=5.10",
        "accelerate>=1.10",
        "safetensors>=0.6",
        "open_clip_torch>=3.0",
        "datasets>=4.0",
        "evaluate>=0.4.6",
        "opencv-python-headless>=5.0",  # older ones round warps to 1/32 of a pixel
        "pillow>=11",
        "peft>=0.17",
        "tensorboard>=2.15",
        "tqdm>=4.66",
    ],
    extras_require={
        "test": [
            "av>=15",
            "cityscapesScripts>=2.2",
            "onnx>=1.18",
            "onnxruntime>=1.22",
            "onnxscript>=0.5",
            "pytest>=8",
            "ruff>=0.12",
            "torchao>=0.14",
            "torchmetrics>=1.4",
        ],
        "export": ["onnx>=1.18", "onnxruntime>=1.22", "onnxscript>=0.5"],
        "int8": ["torchao>=0.14"],
        "xformers": ["xformers"],
        "video": ["av>=15"],
    },
)

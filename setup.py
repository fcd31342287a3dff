"""Packaging: the one package, `tqdm_seg`, of a wheel has a checkout's root modules, metric, examples and recipes, too.

The distribution is not called "tqdm": that name belongs to the progress bar.
"""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "tqdm_seg" / "__init__.py").read_text(encoding="utf-8"), re.M)[1]
EXPORT = ["onnx>=1.18", "onnxruntime>=1.22", "onnxscript>=0.5"]
INT8 = ["torchao>=0.14"]
VIDEO = ["av>=15"]


class BuildPackage(build_py):
    """Adds what a checkout keeps next to the package: the modules that ship to the Hub, train.py, metric, examples."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """(package, module, file) of every module."""
        found = super().find_package_modules(package, package_dir)
        if package == "tqdm_seg":
            found += [(package, path.stem, path.name) for path in [*ROOT.glob("*_tqdm.py"), ROOT / "train.py"]]
        return found

    def run(self) -> None:
        """Copies modules, then the folders that users without a checkout need."""
        super().run()
        if not self.editable_mode:
            for folder in ("metrics", "examples", "recipes"):
                target = Path(self.build_lib) / "tqdm_seg" / folder
                shutil.copytree(ROOT / folder, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


def description() -> str:
    """The README without the Hub's header, and without images of and links to files of the repository."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("---\n", 2)[-1]
    return re.sub(r"(!?)\[([^]]*)\]\((?!https?:|#)[^)]*\)", lambda link: "" if link[1] else link[2], text)


setup(
    name="tqdm-segmentation",
    version=VERSION,
    description="tqdm: textual queries segment scenes never seen in training (Hugging Face Transformers)",
    long_description=description(),
    long_description_content_type="text/markdown",
    project_urls={
        "Paper": "https://arxiv.org/abs/2407.09033",
        "Authors' code": "https://github.com/ByeongHyunPak/tqdm",
    },
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Intended Audience :: Developers",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    keywords=["semantic segmentation", "domain generalization", "CLIP", "transformers", "off-road"],
    python_requires=">=3.10",
    packages=find_packages(include=["tqdm_seg", "tqdm_seg.*"]),
    package_dir={"": "."},  # editable installs then put the checkout on the path, where editors find it
    package_data={"tqdm_seg": ["py.typed", "data/lists/**/*", "**/templates/*"]},
    exclude_package_data={"tqdm_seg": ["*.pyi"]},  # they stand for the root's modules, which a wheel holds itself
    entry_points={"console_scripts": ["tqdm-seg = tqdm_seg.cli:main"]},
    cmdclass={"build_py": BuildPackage},
    install_requires=[
        "torch>=2.11",  # 2.10 fails to compile a training step on images of several sizes
        "torchvision>=0.26",
        "transformers>=5.10",
        "accelerate>=1.10",
        "safetensors>=0.8",  # in older ones, loaded weights change when their file is written again
        "open_clip_torch>=3.0",
        "datasets>=4.1",
        "fsspec>=2025.3.2",  # older ones hang in forked loader workers that read URLs
        "huggingface_hub>=1.17",  # older ones do not bring what their command `hf` needs
        "numpy>=2.0",
        "pyarrow>=21",
        "evaluate>=0.4.6",
        "jinja2>=3.1",
        "opencv-python-headless>=5.0",  # older ones round warps to 1/32 of a pixel
        "pillow>=11",
        "peft>=0.18",  # the first for transformers 5
        "tensorboard>=2.18",  # the first for NumPy 2
        "tqdm>=4.66.3",
    ],
    extras_require={
        "test": [
            *EXPORT,
            *INT8,
            *VIDEO,
            "cityscapesScripts>=2.2",
            "pyright>=1.1.400",
            "hypothesis>=6.100",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "setuptools>=77",
            "torchmetrics>=1.4",
        ],
        "export": EXPORT,
        "int8": INT8,
        "video": VIDEO,
        "xformers": ["xformers"],
    },
)

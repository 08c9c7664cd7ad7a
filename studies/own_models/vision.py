"""A data set of torchvision: `pip install 'momentum-tuner[vision]'`."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from momentum_tuner import Task


def in_memory(dataset) -> TensorDataset:
    """All examples at once, as their transform makes them; stays on the device, so no trial waits for its data."""
    return TensorDataset(*next(iter(DataLoader(dataset, batch_size=len(dataset)))))


def accuracy(model, batch):
    return (model(batch[0]).argmax(-1) == batch[1]).float().mean()


def build(folder: str = "data", download: bool = False, channels: int = 8) -> Task:
    from torchvision.datasets import MNIST
    from torchvision.transforms import v2

    transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.1307], [0.3081])])
    return Task(
        model=lambda: nn.Sequential(
            nn.Conv2d(1, channels, 5, stride=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36 * channels, 10)
        ),
        loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        train=in_memory(MNIST(folder, train=True, download=download, transform=transform)),
        valid=in_memory(MNIST(folder, train=False, download=download, transform=transform)),
        metrics={"accuracy": accuracy},
    )

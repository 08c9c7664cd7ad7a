"""Handwritten digits, 8x8 pixels, from scikit-learn: small networks of the usual kinds on one data set."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from momentum_tuner.errors import TaskError
from momentum_tuner.tasks.task import Task, checked

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]

_CLASSES = 10
_PIXELS = 8  # along each side
_BRIGHTEST = 16
_TRAINED_ON = 1437
_CELLS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


@functools.cache
def _digits() -> tuple[TensorDataset, TensorDataset]:
    """1437 training and 360 validation images `[n, 8, 8]` in [0, 1], labels `[n]`; the same for all seeds.

    The split is scikit-learn's own of 20%, stratified, with the seed 0.
    """
    images, labels = _images()
    rows = np.load(Path(__file__).with_name("digits_split.npy"))

    def dataset(part: NDArray[np.uint16]) -> TensorDataset:
        pixels = torch.tensor(images[part] / _BRIGHTEST, dtype=torch.float32)
        return TensorDataset(pixels, torch.tensor(labels[part], dtype=torch.int64))

    return dataset(rows[:_TRAINED_ON]), dataset(rows[_TRAINED_ON:])


def _images() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Images `[1797, 8, 8]` and labels `[1797]`, from the file that comes with scikit-learn.

    To import scikit-learn for that would take a worker longer than all else between its start and its first step.
    """
    package = importlib.util.find_spec("sklearn")
    assert package is not None and package.origin is not None
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if not file.exists():  # another release may keep it elsewhere
        from sklearn.datasets import load_digits

        found = load_digits()
        return found.images, found.target
    table = np.loadtxt(file, delimiter=",")
    return table[:, :-1].reshape(-1, _PIXELS, _PIXELS), table[:, -1].astype(np.int64)


def _loss(model: nn.Module, batch: Any) -> Tensor:
    images, labels = batch
    return cross_entropy(model(images), labels)


def _accuracy(model: nn.Module, batch: Any) -> Tensor:
    images, labels = batch
    hits: Tensor = model(images).argmax(dim=-1) == labels
    return hits.to(images.dtype).mean()


def _task(model: type[nn.Module], *args: Any) -> Task:
    train, valid = _digits()
    return Task(
        model=functools.partial(model, *args),
        loss=_loss,
        train=train,
        valid=valid,
        metrics={"accuracy": _accuracy},
    )


class _Perceptron(nn.Sequential):
    def __init__(self, hidden: int, layers: int) -> None:
        widths = [_PIXELS**2] + [hidden] * layers
        modules: list[nn.Module] = [nn.Flatten()]
        for width, next_width in itertools.pairwise(widths):
            modules += [nn.Linear(width, next_width), nn.ReLU()]
        super().__init__(*modules, nn.Linear(widths[-1], _CLASSES))


class _Convolutions(nn.Sequential):
    def __init__(self, channels: int, batch_norm: bool) -> None:
        modules: list[nn.Module] = [nn.Unflatten(1, (1, _PIXELS))]  # [batch, 1, 8, 8]
        for inputs, outputs in ((1, channels), (channels, 2 * channels)):
            # Batch norm subtracts the mean, and with it any bias.
            modules.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=not batch_norm))
            if batch_norm:
                modules.append(nn.BatchNorm2d(outputs))
            modules += [nn.ReLU(), nn.MaxPool2d(2)]
        side = _PIXELS // 4
        super().__init__(*modules, nn.Flatten(), nn.Linear(2 * channels * side**2, _CLASSES))


class _RowReader(nn.Module):
    """Reads an image row by row and classifies it by the last output."""

    def __init__(self, cell: str, hidden: int) -> None:
        super().__init__()
        self.recurrent = _CELLS[cell](_PIXELS, hidden, batch_first=True)
        self.head = nn.Linear(hidden, _CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        outputs, _ = self.recurrent(images)  # [batch, rows, hidden]
        logits: Tensor = self.head(outputs[:, -1])
        return logits


class _RowAttender(nn.Module):
    """Attends to the rows of an image, each a token, and classifies it by the mean over them."""

    def __init__(self, width: int, heads: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Linear(_PIXELS, width)
        self.places = nn.Parameter(0.02 * torch.randn(_PIXELS, width))
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, _CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.encoder(self.embed(images) + self.places)  # [batch, rows, width]
        logits: Tensor = self.head(tokens.mean(dim=1))
        return logits


@checked
def digits_mlp(hidden: Count = 64, layers: Count = 2) -> Task:
    """Digits by a multilayer perceptron, 64-hidden-...-hidden-10 with ReLU.

    Args:
        hidden: units in each hidden layer.
        layers: hidden layers.

    Returns:
        the task: images `[batch, 8, 8]` in [0, 1], labels `[batch]`, cross-entropy in nats, and `accuracy`.

    Raises:
        TaskError: an option is not allowed.

    Source: `sklearn.datasets.load_digits`, split 80/20 by class with a fixed seed.
    """
    return _task(_Perceptron, hidden, layers)


@checked
def digits_cnn(channels: Count = 16, batch_norm: bool = False) -> Task:
    """Digits by two 3x3 convolutions with ReLU and 2x2 max-pooling, then a linear layer.

    Args:
        channels: of the first convolution; the second has twice as many.
        batch_norm: whether each convolution, then without bias, is batch-normalized before its ReLU.

    Returns:
        the task, with data, loss and metric as in `digits_mlp`.

    Raises:
        TaskError: an option is not allowed.
    """
    return _task(_Convolutions, channels, batch_norm)


@checked
def digits_rnn(cell: Literal["rnn", "lstm", "gru"] = "rnn", hidden: Count = 32) -> Task:
    """Digits read as sequences of 8 rows of 8 pixels by one recurrent layer, whose last output is classified.

    Args:
        cell: plain tanh units, LSTM or GRU.
        hidden: units of the recurrent layer.

    Returns:
        the task, with data, loss and metric as in `digits_mlp`.

    Raises:
        TaskError: an option is not allowed.
    """
    return _task(_RowReader, cell, hidden)


@checked
def digits_transformer(width: Count = 32, heads: Count = 4, layers: Count = 2, dropout: Share = 0.0) -> Task:
    """Digits read as sequences of 8 rows of 8 pixels by a Transformer encoder, whose mean output is classified.

    Args:
        width: features of a token; the layers within are twice as wide.
        heads: of the attention; a divisor of `width`.
        layers: of the encoder.
        dropout: share of the units that each layer drops in training.

    Returns:
        the task, with data, loss and metric as in `digits_mlp`.

    Raises:
        TaskError: an option is not allowed.
    """
    if width % heads:
        raise TaskError(f"heads: must divide width ({width}), not {heads}")
    return _task(_RowAttender, width, heads, layers, dropout)

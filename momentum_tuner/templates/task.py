"""What is trained: put your own model, loss and data in the place of these."""

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from momentum_tuner import Task


def build(hidden: int = 32) -> Task:
    """`hidden` comes from `task.params` in study.yaml, as any other argument would."""
    # Real measurements of 569 tumours that come with scikit-learn: malignant or benign?
    data = load_breast_cancer()
    x = torch.tensor(data.data, dtype=torch.float32)
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))  # the same split in every process
    train, valid = order[:426], order[426:]
    x = (x - x[train].mean(0)) / x[train].std(0)  # of the training set alone: validation must stay unseen

    return Task(
        # Builds a new model; it is called under the trial's seed, which fixes the initial weights.
        model=lambda: nn.Sequential(nn.Linear(30, hidden), nn.ReLU(), nn.Linear(hidden, 2)),
        # Of the model and a batch, the mean over the batch.
        loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        # Tensors in memory stay on the device, and each trial draws its own batches. A DataLoader, or any other
        # iterable of batches, can stand in their place.
        train=TensorDataset(x[train], y[train]),
        valid=TensorDataset(x[valid], y[valid]),
        # Further measures on the validation set, each a mean over the batch: they are `valid_accuracy` and so on.
        metrics={"accuracy": lambda model, batch: (model(batch[0]).argmax(-1) == batch[1]).float().mean()},
    )

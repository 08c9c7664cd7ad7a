"""Malignant or benign: a small network on scikit-learn's breast cancer data, as an example of your own task."""

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from momentum_tuner import Task


def build(hidden: int = 32) -> Task:
    """`hidden` can be set in the study file, under `task.params`."""
    x, y = load_breast_cancer(return_X_y=True)
    x, x_valid, y, y_valid = train_test_split(x, y, test_size=0.25, stratify=y, random_state=0)
    scaler = StandardScaler().fit(x)  # on the training set alone: validation must stay unseen

    def dataset(features, labels):
        features = scaler.transform(features)
        return TensorDataset(torch.tensor(features, dtype=torch.float32), torch.tensor(labels))

    return Task(
        model=lambda: nn.Sequential(nn.Linear(30, hidden), nn.ReLU(), nn.Linear(hidden, 2)),
        loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        train=dataset(x, y),
        valid=dataset(x_valid, y_valid),
        metrics={"accuracy": lambda model, batch: (model(batch[0]).argmax(-1) == batch[1]).float().mean()},
    )

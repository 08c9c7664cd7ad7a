from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from momentum_tuner import tasks
from momentum_tuner.tasks import Task, content, describe_data


def rows(seed: int = 0, count: int = 12) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 3, generator=generator), torch.arange(count) % 2)


def task(train, valid) -> Task:
    return Task(
        model=lambda: nn.Linear(3, 1), loss=lambda model, batch: model(batch[0]).sum(), train=train, valid=valid
    )


def digest(train, valid, factory: str = "mine:build", **params) -> str:
    return describe_data(task(train, valid), factory, params)["digest"]


def test_tensors_are_told_by_their_values_whatever_made_them():
    same = digest(rows(), rows(1, 4))
    assert digest(rows(), rows(1, 4), "other:build", hidden=3) == same
    assert digest(rows(2), rows(1, 4)) != same
    assert digest(rows(), rows(2, 4)) != same
    assert digest(rows(1, 4), rows()) != same
    wider = TensorDataset(rows().tensors[0].double(), rows().tensors[1])
    assert digest(wider, rows(1, 4)) != same
    assert len(same) == 16
    assert int(same, 16) >= 0


def test_one_changed_value_changes_the_digest():
    changed = rows()
    changed.tensors[0][7, 2] += 1e-6
    assert digest(changed, rows(1, 4)) != digest(rows(), rows(1, 4))


def test_the_sizes_and_the_kind_are_told():
    found = describe_data(task(rows(), rows(1, 4)), "momentum_tuner.tasks:mine", {})
    assert {k: found[k] for k in ("name", "source", "kind", "train", "valid")} == {
        "name": "mine",
        "source": "momentum_tuner.tasks:mine",
        "kind": "tensors",
        "train": [[12, 3], [12]],
        "valid": [[4, 3], [4]],
    }


def test_batches_made_on_the_fly_are_not_read():
    class Loud(DataLoader):
        def __iter__(self):
            raise AssertionError("read")

    loaders = Loud(rows(), batch_size=4), Loud(rows(), batch_size=6)
    found = describe_data(task(*loaders), "mine:build", {"a": 1})
    assert (found["kind"], found["train"], found["valid"]) == ("batches", 3, 2)
    assert digest(*loaders, a=1) == found["digest"]
    assert digest(*loaders, a=2) != found["digest"]
    assert digest(*loaders, "other:build", a=1) != found["digest"]


def test_a_landscape_is_told_by_its_factory_and_params():
    found = describe_data(tasks.rosenbrock(), "momentum_tuner.tasks:rosenbrock", {"dim": 2})
    assert found["kind"] == "landscape"
    assert found["digest"] != describe_data(tasks.rosenbrock(), "momentum_tuner.tasks:rosenbrock", {"dim": 3})["digest"]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.complex64, torch.float64])
def test_values_of_any_type_are_read(dtype):
    values = (torch.arange(12) % 2).reshape(4, 3).to(dtype)
    other = values.clone()
    other[0, 0] = 1
    assert digest(TensorDataset(values), rows()) != digest(TensorDataset(other), rows())


def test_of_large_tensors_evenly_spaced_rows_are_read(monkeypatch):
    monkeypatch.setattr(content, "_MOST_BYTES", 36)  # of 12 rows of 12 bytes, every fourth
    before = digest(rows(), rows(1, 1))
    for row, seen in ((0, True), (1, False), (8, True)):
        changed = rows()
        changed.tensors[0][row] += 1.0
        assert (digest(changed, rows(1, 1)) != before) is seen, row

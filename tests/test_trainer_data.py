"""Batches of every form that a DataLoader gives train fused as they do one slot at a time."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from momentum_tuner import Task
from momentum_tuner.errors import TaskError
from momentum_tuner.metrics import EpochRecord
from momentum_tuner.tasks import check_task
from momentum_tuner.trainer import Trainer, TrialSettings
from momentum_tuner.trainer.data import place

torch.set_num_threads(1)
EXAMPLES, FEATURES, BATCH = 28, 5, 8
X = torch.randn(EXAMPLES, FEATURES, generator=torch.Generator().manual_seed(0))
Y = X.sin().sum(dim=1, keepdim=True)


class Noisy(Dataset):
    """Dictionaries with noise, a name and a number, of examples of which the last batch has fewer."""

    def __len__(self):
        return EXAMPLES

    def __getitem__(self, i):
        return {"x": X[i] + 0.1 * torch.randn(FEATURES), "y": Y[i], "name": f"example {i}", "number": i}


class Stream(IterableDataset):
    """An endless stream, of which each worker process reads its own part."""

    def __iter__(self):
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        while True:
            for i in range(first, EXAMPLES, step):
                yield X[i] + 0.1 * torch.randn(FEATURES), Y[i]


Pair = namedtuple("Pair", "x y")


@dataclass
class Record:
    x: Tensor
    y: Tensor


def both(items) -> tuple[Tensor, Tensor]:
    return torch.stack([item["x"] for item in items]), torch.stack([item["y"] for item in items])


def padded(items):
    x, y = both(items)
    width = int(torch.randint(FEATURES, FEATURES + 3, ()))  # another one in each batch, and for each trial
    return {"inputs": {"x": pad(x, (0, width - FEATURES))}, "y": y, "width": width}


def dictionary(**options) -> DataLoader:
    return DataLoader(Noisy(), batch_size=BATCH, shuffle=True, **options)


TRAIN: dict[str, Callable[[], DataLoader]] = {
    "dictionary": dictionary,
    "dictionary from 2 workers": lambda: dictionary(num_workers=2),
    "named tuple": lambda: dictionary(collate_fn=lambda items: Pair(*both(items))),
    "ordered": lambda: dictionary(collate_fn=lambda items: OrderedDict(zip("xy", both(items), strict=True))),
    "mapping of its own kind": lambda: dictionary(
        collate_fn=lambda items: UserDict(zip("xy", both(items), strict=True))
    ),
    "object": lambda: dictionary(collate_fn=lambda items: Record(*both(items))),
    "padded": lambda: dictionary(collate_fn=padded),
    "stream": lambda: DataLoader(Stream(), batch_size=BATCH),
    "stream from 2 workers": lambda: DataLoader(Stream(), batch_size=BATCH, num_workers=2),
}


def parts(batch) -> tuple[Tensor, Tensor]:
    if isinstance(batch, dict):
        inputs = batch["inputs"]["x"] if "inputs" in batch else batch["x"]
        return inputs[..., :FEATURES], batch["y"]
    return tuple(batch) if isinstance(batch, list | tuple) else (batch.x, batch.y)


def error(model, batch) -> Tensor:
    x, y = parts(batch)
    return (model(x) - y).square().mean()


def make_task(train: DataLoader, valid: DataLoader | None = None) -> Task:
    return Task(
        model=lambda: nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh(), nn.Linear(7, 1)),
        loss=error,
        train=train,
        valid=DataLoader([(X, Y)], batch_size=None) if valid is None else valid,
        steps_per_epoch=6 if isinstance(train.dataset, IterableDataset) else None,
    )


def records(task: Task, mode: str, seeds=(1, 2, 1), epochs: int = 2) -> list[EpochRecord]:
    trainer = Trainer(task, epochs=epochs, slots=len(seeds), mode=mode)
    for key, seed in enumerate(seeds):
        rates = {"learning_rate": 0.05 * (key + 1), "momentum": 0.5}
        trainer.admit(key, TrialSettings("momentum", rates, BATCH, seed))
    return [record for _ in range(epochs) for _, record in trainer.train_epoch()]


def by_plain_torch(train: DataLoader, epoch: int) -> list[tuple[Tensor, Tensor]]:
    """The batches of the first trial's epoch, taken without the trainer."""
    from momentum_tuner.trainer.randomness import mix_seed

    torch.manual_seed(mix_seed(1, epoch))
    return [parts(batch) for batch in train]


@pytest.mark.parametrize("kind", TRAIN)
def test_batches_of_every_form_train_fused_as_one_slot_at_a_time(kind):
    task = make_task(TRAIN[kind]())
    check_task(task)
    fused, alone = records(task, "fused"), records(task, "sequential")
    for ours, theirs in zip(fused, alone, strict=True):
        assert (ours.epoch, ours.step) == (theirs.epoch, theirs.step)
        for name in ("train_loss", "valid_loss", "grad_norm"):
            assert ours.value(name) == pytest.approx(theirs.value(name), rel=1e-4), name
    first = [record for record in fused if record.epoch == 1]
    assert len({record.train_loss for record in first}) == 3
    assert {record.step for record in first} == {6 if "stream" in kind else 4}


def test_a_trial_sees_the_batches_that_plain_torch_gives_under_its_seed():
    train = dictionary()
    record = records(make_task(train), "fused", seeds=(1, 2), epochs=1)[0]
    torch.manual_seed(1)
    model = make_task(train).model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    losses = []
    for batch in by_plain_torch(train, 1):
        loss = error(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert len(losses) == 4
    assert record.train_loss == pytest.approx(sum(losses) / 4, rel=1e-5)


@pytest.mark.parametrize("kind", ["dictionary", "mapping of its own kind", "object", "named tuple"])
def test_every_example_of_unequal_validation_batches_counts_the_same(kind):
    torch.manual_seed(0)
    valid = list(DataLoader(TRAIN[kind]().dataset, batch_size=BATCH, collate_fn=TRAIN[kind]().collate_fn))
    trainer = Trainer(make_task(dictionary(), valid), epochs=1, slots=1)
    found = trainer.admit("a", TrialSettings("sgd", {"learning_rate": 0.1}, BATCH, 5)).valid_loss
    torch.manual_seed(5)
    model = trainer.task.model()
    x, y = (torch.cat(column) for column in zip(*[parts(dict(b) if "own" in kind else b) for b in valid], strict=True))
    assert len(x) == EXAMPLES
    assert found == pytest.approx((model(x) - y).square().mean().item(), rel=1e-5)


def test_mappings_are_stacked_and_other_objects_move_by_their_own_to():
    class Graph:
        def to(self, device):
            return f"a graph on {device}"

    batch = UserDict(x=torch.ones(2), graph=Graph(), inner=UserDict(name="a"), items=[torch.ones(1), "b"])
    found = place(batch, torch.device("meta"), torch.float64)
    assert found["x"].device.type == found["items"][0].device.type == "meta"
    assert found["x"].dtype is torch.float64
    assert type(found) is type(found["inner"]) is dict
    assert (found["graph"], found["inner"], found["items"][1]) == ("a graph on meta", {"name": "a"}, "b")


def test_a_loss_that_asks_a_mapping_for_what_a_dict_has_not_hears_of_it_at_once():
    valid = train = [UserDict(x=X, y=Y)]
    task = Task(model=lambda: nn.Linear(FEATURES, 1), loss=lambda m, b: m(b.data["x"]).mean(), train=train, valid=valid)
    with pytest.raises(TaskError, match=r"'dict' object has no attribute 'data' \(.*test_trainer_data.py:\d+\)"):
        check_task(task)

"""Tasks from a real Lightning module and from models of Hugging Face's form train as the same task written by hand."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from momentum_tuner import Task, from_huggingface, from_lightning
from momentum_tuner.errors import TaskError
from momentum_tuner.tasks import check_task
from momentum_tuner.trainer import Trainer, TrialSettings

torch.set_num_threads(1)


def points(count: int = 96, seed: int = 0) -> TensorDataset:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x.sum(dim=1) > 0).long())


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(-1) == labels).float().mean()


def by_hand() -> Task:
    return Task(
        model=lambda: nn.Linear(4, 2),
        loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        train=points(),
        valid=points(40, seed=1),
        metrics={"accuracy": lambda model, batch: accuracy(model(batch[0]), batch[1])},
    )


def records(task: Task, mode: str = "fused", epochs: int = 2) -> list[tuple[float, float, float]]:
    check_task(task)
    trainer = Trainer(task, epochs=epochs, slots=2, mode=mode)
    for key, rate in (("a", 0.1), ("b", 0.5)):
        trainer.admit(key, TrialSettings("momentum", {"learning_rate": rate, "momentum": 0.9}, 16, seed=3))
    found = [record for _ in range(epochs) for _, record in trainer.train_epoch()]
    return [(r.train_loss, r.valid_loss, r.metrics.get("accuracy")) for r in found]


def same(task: Task, mode: str) -> None:
    for ours, theirs in zip(records(task, mode), records(by_hand(), mode), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


class Lit(lightning.LightningModule):
    """As Lightning's documentation writes them: what is measured goes to `self.log`."""

    def __init__(self, hidden: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(4, 2)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = cross_entropy(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return {"loss": loss}

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.log_dict({"val_loss": cross_entropy(logits, y), "val_acc": accuracy(logits, y)}, on_epoch=True)

    def configure_optimizers(self):
        raise AssertionError("the study has the optimizer")


def lightning_task(build, **options) -> Task:
    return from_lightning(build, points(), points(40, seed=1), **options)


@pytest.mark.parametrize("mode", ["fused", "sequential"])
def test_a_lightning_module_trains_as_the_task_written_by_hand(mode):
    same(lightning_task(Lit, metrics={"accuracy": "val_acc"}), mode)


def test_a_lightning_module_is_fused_and_forgets_what_it_logged():
    trainer = Trainer(lightning_task(Lit, metrics={"accuracy": "val_acc"}), epochs=1, slots=2)
    assert trainer.objective.reason is None or "times as fast" in trainer.objective.reason
    assert trainer.objective.wrapper.model._logged.values == {}


def test_a_validation_step_may_return_its_loss_and_take_the_batch_alone():
    class Returns(Lit):
        def training_step(self, batch):
            return cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch):
            loss = self.training_step(batch)
            self.log("val_accuracy", float(accuracy(self(batch[0]), batch[1])))
            return loss

    same(lightning_task(Returns, metrics={"accuracy": "val_accuracy"}), "sequential")


class WithoutValidation(nn.Module):
    def training_step(self, batch, batch_idx):
        raise AssertionError


class Manual(Lit):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Silent(Lit):
    def validation_step(self, batch, batch_idx):
        self.log("val_error", 1.0)


class Lossless(Lit):
    def training_step(self, batch, batch_idx):
        self.log("train_loss", 1.0)


class Curious(Lit):
    def training_step(self, batch, batch_idx):
        return self.trainer.max_epochs


class Metric(Lit):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("val_acc", nn.Identity())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (WithoutValidation, "a Lightning module needs a validation_step, which WithoutValidation has not"),
        (Manual, "a Lightning module with manual optimization has a loop of its own: return a Loop instead"),
        (Silent, "validation_step neither logs 'val_loss' nor returns a loss (it logs 'val_error')"),
        (Lossless, "training_step must return the loss, not NoneType"),
        (Curious, "is not attached to a `Trainer`"),
        (Metric, "self.log('val_acc') is given a Identity: log a number"),
    ],
)
def test_a_lightning_module_that_cannot_be_trained_is_refused_in_one_line(build, message):
    with pytest.raises(TaskError) as refused:
        check_task(lightning_task(build, metrics={"accuracy": "val_acc"}))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_metric_that_is_not_logged_is_named():
    with pytest.raises(TaskError, match="does not log 'acc'; it logs 'val_loss', 'val_acc'"):
        check_task(lightning_task(Lit, metrics={"accuracy": "acc"}))


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


class Classifier(nn.Module):
    """Of the form of Hugging Face's: the loss comes with the output where the batch has labels."""

    def __init__(self, kind: str = "object") -> None:
        super().__init__()
        self.net = nn.Linear(4, 2)
        self.kind = kind

    def forward(self, inputs, labels=None):
        logits = self.net(inputs)
        loss = None if labels is None else cross_entropy(logits, labels)
        if self.kind == "mapping":
            return OrderedDict(loss=loss, logits=logits)
        return Output(loss, logits) if self.kind == "object" else (loss, logits)


def dictionaries(data: TensorDataset, **options) -> DataLoader:
    return DataLoader([{"inputs": x, "labels": y} for x, y in data], **options)


def logits_of(output) -> Tensor:
    return output["logits"] if isinstance(output, OrderedDict) else output.logits


METRICS = {"accuracy": lambda output, batch: accuracy(logits_of(output), batch["labels"])}


@pytest.mark.parametrize("mode", ["fused", "sequential"])
@pytest.mark.parametrize("kind", ["object", "mapping"])
def test_a_model_that_returns_its_loss_trains_as_the_task_written_by_hand(kind, mode):
    columns = ("inputs", "labels")
    build = lambda: Classifier(kind)  # noqa: E731
    same(from_huggingface(build, points(), points(40, seed=1), columns=columns, metrics=METRICS), mode)


def test_batches_that_are_mappings_need_no_names():
    valid = dictionaries(points(40, seed=1), batch_size=40)
    task = from_huggingface(Classifier, dictionaries(points(), batch_size=16, shuffle=True), valid, metrics=METRICS)
    fused, alone = records(task, "fused"), records(task, "sequential")
    assert [x for row in fused for x in row] == pytest.approx([x for row in alone for x in row], rel=1e-5)
    assert fused[-1][0] < fused[0][0]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (lambda: from_huggingface(Classifier, points(), points()), "columns names 0 parts of a batch, but train has 2"),
        (lambda: from_huggingface(Classifier, [torch.ones(2, 4)], [torch.ones(2, 4)]), "a batch is a Tensor, but the"),
        (
            lambda: from_huggingface(Classifier, [{"inputs": torch.ones(2, 4)}], [{"inputs": torch.ones(2, 4)}]),
            "the model's output, a Output, has no loss: give it labels",
        ),
        (
            lambda: from_huggingface(lambda: Classifier("tuple"), points(), points(), columns=("inputs", "labels")),
            "the model's output, a tuple, has no loss",
        ),
    ],
)
def test_a_model_without_a_loss_is_refused_in_one_line(task, message):
    with pytest.raises(TaskError) as refused:
        check_task(task())
    assert message in str(refused.value) and "\n" not in str(refused.value)

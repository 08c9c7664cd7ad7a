"""Models and losses that a plain torch loop trains, train here as they do there: each test compares the curves."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from momentum_tuner.errors import TaskError
from momentum_tuner.tasks import check_task
from momentum_tuner.trainer import Trainer, TrialSettings, fill_model, replay
from momentum_tuner.trainer.data import MemorySource
from momentum_tuner.trainer.objective import EVALUATION, GRADIENT

from .half_epochs import BATCH, FEATURES, STEPS, make_task

torch.set_num_threads(1)

EPOCHS = 3


@pytest.fixture(params=["fused", "sequential"])
def mode(request):
    return request.param


def settings(learning_rate=0.05, seed=3, weight_decay=0.01):
    hyper = {"learning_rate": learning_rate, "momentum": 0.9, "weight_decay": weight_decay}
    return TrialSettings("momentum", hyper, BATCH, seed)


def plain_curve(task, trial):
    """Training and validation loss of each epoch, from a loop that shares no more with the trainer than the order."""
    torch.manual_seed(trial.seed)
    model = task.model()
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=trial.value("learning_rate"),
        momentum=trial.value("momentum"),
        weight_decay=trial.value("weight_decay"),
    )
    found = []
    for epoch in range(1, EPOCHS + 1):
        losses = []
        model.train()
        for at in MemorySource(task.train.tensors, BATCH).order((trial.seed, epoch)):
            optimizer.zero_grad()
            loss = task.loss(model, tuple(t[at] for t in task.train.tensors))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            found += [sum(losses) / len(losses), task.loss(model, task.valid.tensors).item()]
    return found


def curve(task, trials, which=0, **options):
    """The same of one of some trials that train together, and their trainer."""
    trainer = Trainer(task, epochs=EPOCHS, slots=len(trials), **options)
    for key, trial in enumerate(trials):
        trainer.admit(key, trial)
    records = [dict(trainer.train_epoch())[which] for _ in range(EPOCHS)]
    return [value for record in records for value in (record.train_loss, record.valid_loss)], trainer


def same(expected, rel=1e-4):
    return pytest.approx(expected, rel=rel)


# --- parts of a model that are computed anew for their gradient


class Checkpointed(nn.Module):
    """Two equal parts, of which the gradient may be taken from a second forward pass."""

    def __init__(self, part, reentrant):
        super().__init__()
        self.first, self.part, self.last = nn.Linear(FEATURES, 8), part, nn.Linear(8, 1)
        self.reentrant = reentrant

    def forward(self, x):
        hidden = self.first(x)
        for _ in range(2):
            hidden = (
                self.part(hidden)
                if self.reentrant is None
                else checkpoint(self.part, hidden, use_reentrant=self.reentrant)
            )
        return self.last(hidden)


class Attending(nn.TransformerEncoderLayer):
    def forward(self, x):
        return super().forward(x.unflatten(1, (2, 4))).flatten(1)


def dropping():
    return nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 8), nn.Dropout(0.2))


def attending():
    return Attending(4, 2, 8, 0.3, batch_first=True)


@pytest.mark.filterwarnings("ignore:None of the inputs")  # torch's own, in evaluation
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts_have_the_gradient_of_the_parameters_that_were_used(reentrant):
    task = make_task(lambda: Checkpointed(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), reentrant))
    found, trainer = curve(task, [settings(), settings(0.02, 1)])
    assert not trainer.objective.batch_slots and found == same(plain_curve(task, settings()))


@pytest.mark.filterwarnings("ignore:None of the inputs")  # torch's own, in evaluation
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("part", [dropping, attending])
def test_checkpointed_parts_drop_the_same_units_when_they_are_computed_anew(part, reentrant):
    trials = [settings(), settings(0.02, 1)]
    plain = make_task(lambda: Checkpointed(part(), None))
    expected, _ = curve(plain, trials, mode="fused")
    assert curve(plain, trials, mode="sequential")[0] == same(expected)
    task = make_task(lambda: Checkpointed(part(), reentrant))
    assert curve(task, trials)[0] == same(expected)


# --- losses with a penalty on the parameters


PENALIZED = {
    "all": lambda p: True,
    "trainable": lambda p: p.requires_grad,
    "parameters": lambda p: isinstance(p, nn.Parameter),
    "leaves of matrices": lambda p: p.ndim > 1 and p.requires_grad and isinstance(p, nn.Parameter),
}


def half_frozen():
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 1))
    model[3].requires_grad_(False)
    torch.nn.init.constant_(model[3].bias, 0.1)  # which all trials share, while the matrix follows the seed
    return model


@pytest.mark.parametrize("which", PENALIZED)
@pytest.mark.parametrize("scale", [0.02, 1e-5])
def test_a_penalty_on_some_parameters_is_in_force_in_training_and_evaluation(which, scale, mode):
    def loss(model, batch):
        error = (model(batch[0]) - batch[1]).square().mean()
        return error + scale * sum(p.square().sum() for p in model.parameters() if PENALIZED[which](p))

    task = make_task(half_frozen, loss=loss)
    found, trainer = curve(task, [settings(0.02, 1), settings()], which=1, mode=mode)
    expected = plain_curve(task, settings())
    assert found == same(expected, 1e-5 if scale < 1e-3 else 1e-4)
    assert trainer.objective.batch_slots == (mode == "fused")
    if mode == "fused":
        assert trainer.objective._asks_for_gradients == ("trainable" in which or "leaves" in which)


def test_a_penalty_is_in_force_in_captured_steps(monkeypatch):
    monkeypatch.setattr(replay, "PATIENCE", 0)

    def loss(model, batch):
        error = (model(batch[0]) - batch[1]).square().mean()
        kept = (p for p in model.parameters() if p.requires_grad or isinstance(p, nn.Parameter))
        return error + 0.02 * sum(p.square().sum() for p in kept)

    task = make_task(half_frozen, loss=loss)
    found, trainer = curve(task, [settings(), settings(0.02)], mode="fused")
    assert found == same(plain_curve(task, settings()))
    kinds = [kind for name in (GRADIENT, EVALUATION) for kind in trainer.objective.replay._of(name)]
    assert [kind.captured is not None for kind in kinds] == [True, True]


# --- models with a dropout within a layer, and with much else


class Looking(nn.Module):
    """A convolution, which is changed in place, under an encoder with dropout."""

    def __init__(self, dropout=0.2):
        super().__init__()
        self.see = nn.Sequential(nn.Conv2d(1, 4, 2), nn.ReLU(inplace=True))
        self.encode = nn.TransformerEncoderLayer(4, 2, 8, dropout, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        seen = self.see((x[:, None, :] * x[:, :, None])[:, None])  # [batch, 4, features - 1, features - 1]
        return self.head(self.encode(seen.flatten(2).mT).mean(1))


def smoothed(model, batch):
    """The error, and how fast it changes with the input."""
    with torch.enable_grad():
        x = batch[0].clone().requires_grad_()
        error = (model(x) - batch[1]).square().mean()
        (slope,) = torch.autograd.grad(error, x, create_graph=True)
    return error + slope.square().mean()


def test_layers_beside_a_dropout_within_another_are_torchs_own_where_slots_train_one_after_the_other(mode):
    trials = [settings(), settings(0.02, 1)]
    assert curve(make_task(lambda: Looking(0.0)), trials, mode=mode)[0] == same(
        plain_curve(make_task(lambda: Looking(0.0)), settings())
    )
    dropping = make_task(Looking)
    assert curve(dropping, trials, mode=mode)[0] == same(curve(dropping, [settings()], mode="fused")[0])


class Listening(nn.Module):
    def __init__(self, dropout=0.2):
        super().__init__()
        self.layers, self.head = nn.GRU(1, 4, 2, batch_first=True, dropout=dropout), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.layers(x[:, :, None])[0][:, -1])


@pytest.mark.parametrize("model", [Looking, Listening])
def test_a_penalty_on_the_slope_of_a_model_with_dropout_within_a_layer_is_differentiated(model):
    trials = [settings(), settings(0.02, 1)]
    task = make_task(lambda: model(1e-9), loss=smoothed)  # without any, torch's attention cannot do it
    found, trainer = curve(task, trials)
    assert not trainer.objective.batch_slots
    assert found == same(plain_curve(task, settings()))
    dropping = make_task(model, loss=smoothed)
    found, trainer = curve(dropping, trials)
    assert not trainer.objective.batch_slots
    assert found == same(curve(dropping, [settings()], mode="sequential")[0])


# --- what a model keeps in attributes


class Keeping(nn.Module):
    """What it gives depends on its step, which it keeps in its own way."""

    def __init__(self):
        super().__init__()
        self.line, self.inner = nn.Linear(FEATURES, 1), nn.Module()
        self.start()

    def forward(self, x):
        if self.training:
            self.count()
        return self.line(x) * self.factor()


class InAnAttribute(Keeping):
    def start(self):
        self.inner.step = 0

    def count(self):
        self.inner.step += 1

    def factor(self):
        return 1 - 0.9**self.inner.step


class InALimitedAttribute(InAnAttribute):
    def count(self):
        self.inner.step = min(self.inner.step + 1, 100)


class InAList(InAnAttribute):
    def start(self):
        self.inner.step = []

    def count(self):
        self.inner.step.append(None)

    def factor(self):
        return 1 - 0.9 ** len(self.inner.step)


class InABuffer(InAnAttribute):
    def start(self):
        self.inner.register_buffer("step", torch.zeros(()))


@pytest.mark.parametrize("model", [InAnAttribute, InALimitedAttribute, InAList])
def test_a_model_that_counts_its_steps_in_an_attribute_is_told_to_keep_them_in_a_buffer(model, mode):
    with pytest.raises(TaskError) as caught:
        Trainer(make_task(model), epochs=1, mode=mode)
    assert str(caught.value) == (
        "task.model: inner.step changes in every training step, and all trials would share it; "
        "let the model keep it in a buffer, by register_buffer, of which each trial has its own"
    )


def test_with_its_steps_in_a_buffer_a_model_trains_as_with_an_attribute_alone(mode):
    trials = [settings(), settings(0.02, 1), settings(0.02)]
    assert curve(make_task(InABuffer), trials, mode=mode)[0] == same(plain_curve(make_task(InAnAttribute), settings()))


class Remembering(nn.Module):
    """It keeps what does no harm: what is made once, what is not used again, and what is no number."""

    def __init__(self):
        super().__init__()
        self.line, self.cache, self.scale, self.outputs, self.last = nn.Linear(FEATURES, 1), {}, None, [], None

    def forward(self, x):
        if len(x) not in self.cache:
            self.cache[len(x)] = 0.5
        if self.scale is None:
            self.scale = float(len(self.cache))
        if self.training:
            self.outputs.append(len(x))
        self.last = x.detach()
        return self.line(x) * self.cache[len(x)] * self.scale


def test_attributes_that_do_not_count_steps_are_let_be(mode):
    task = make_task(Remembering)
    assert curve(task, [settings(), settings(0.02, 1)], mode=mode)[0] == same(plain_curve(task, settings()))


class Faulty(nn.Linear):
    def forward(self, x):
        raise ValueError("not today")


def test_a_model_that_cannot_be_called_says_so_when_a_trial_comes():
    trainer = Trainer(make_task(lambda: Faulty(FEATURES, 1)), epochs=1, slots=1)
    with pytest.raises(ValueError, match="not today"):
        trainer.admit("a", settings())


# --- a model of its own from a slot's state


class Features(nn.Module):
    """Random features, and how often it was trained, neither of which is in its state dict; a frozen layer."""

    def __init__(self, width=8):
        super().__init__()
        self.register_buffer("directions", torch.randn(FEATURES, width), persistent=False)
        self.register_buffer("steps", torch.zeros(()), persistent=False)
        self.norm, self.frozen = nn.BatchNorm1d(width), nn.Linear(width, width).requires_grad_(False)
        self.out = nn.Linear(width, 1)

    def forward(self, x):
        self.steps += self.training
        return self.out(self.frozen(self.norm(torch.cos(x @ self.directions)))) / (1 + self.steps)


def test_a_model_is_filled_with_all_that_a_slot_has(mode):
    task = make_task(Features)
    expected = plain_curve(task, settings())
    found, trainer = curve(task, [settings(0.02, 1), settings()], which=1, mode=mode)
    assert found == same(expected)
    torch.manual_seed(0)
    model = fill_model(Features(), trainer.export(1).tensors).eval()
    with torch.no_grad():
        assert task.loss(model, task.valid.tensors).item() == pytest.approx(expected[-1], rel=1e-4)
    assert model.steps.item() == EPOCHS * STEPS


def test_a_model_is_not_filled_with_what_another_has():
    task = make_task(Features)
    trainer = Trainer(task, epochs=1, slots=1)
    trainer.admit("a", settings())
    tensors = trainer.export("a").tensors
    with pytest.raises(TaskError, match=r"^task.model: it has no frozen.weight of shape \[8, 8\], which was trained$"):
        fill_model(nn.Linear(FEATURES, 5), tensors | {"parameters": torch.zeros(25)})
    with pytest.raises(TaskError, match=r"it has no directions of shape \[4, 4\]"):
        fill_model(Features(), tensors | {"buffer/model.directions": torch.zeros(4, 4)})


# --- layers that are not like others


class Embedded(nn.Module):
    """Takes its input's signs for words, 16 in all."""

    def __init__(self, embedding):
        super().__init__()
        self.embed, self.out = embedding, nn.Linear(8, 1)

    def forward(self, x):
        words = ((x[:, :2] > 0).long() + (x[:, 2:] > 0).long() * 2 + torch.arange(2) * 4) * 2
        return self.out(self.embed(words).flatten(1))


class Rotating(nn.Module):
    """Turns its input by complex numbers, which follow the seed or do not."""

    def __init__(self, by_seed):
        super().__init__()
        angles = torch.rand(4) if by_seed else torch.arange(4.0)
        self.register_buffer("turn", torch.polar(torch.ones(4), angles))
        self.first, self.last = nn.Linear(FEATURES, 8), nn.Linear(4, 1)

    def forward(self, x):
        turned = torch.view_as_complex(self.first(x).unflatten(1, (4, 2))) * self.turn
        return self.last(turned.imag.tanh())


RARE = {
    "small embedding of limited length": (lambda: Embedded(nn.Embedding(16, 4, max_norm=0.5)), False),
    "large embedding of limited length": (lambda: Embedded(nn.Embedding(400, 4, max_norm=0.5)), False),
    "small sparse embedding": (lambda: Embedded(nn.Embedding(16, 4, sparse=True)), True),
    "large sparse embedding": (lambda: Embedded(nn.Embedding(400, 4, sparse=True)), True),
    "complex buffer": (lambda: Rotating(False), True),
    "complex buffer that follows the seed": (lambda: Rotating(True), True),
}


@pytest.mark.parametrize("name", RARE)
@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_layers_unlike_others_train_as_in_a_plain_loop(name, precision):
    model, fused = RARE[name]
    task = make_task(model)
    trials = [settings(weight_decay=0.0), settings(0.02, 1, weight_decay=0.0)]
    expected = plain_curve(task, trials[0])
    for mode in ("auto", "sequential"):
        found, trainer = curve(task, trials, mode=mode, precision=precision)
        assert found == same(expected)
        assert trainer.objective.batch_slots == (fused and mode == "auto")


def test_complex_buffers_are_as_exact_as_the_rest():
    trainer = Trainer(make_task(lambda: Rotating(True)), epochs=1, slots=1, precision="float64")
    assert trainer.objective.own["model.turn"][1] == torch.complex128


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(FEATURES, 1, dtype=torch.complex64))

    def forward(self, x):
        return (x.to(self.weight.dtype) @ self.weight).real


REFUSED = {
    "lazy": (
        lambda: nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 1)),
        "Task.model: 0.weight has no shape before the first batch; initialize it in the factory, by calling the model "
        "on an example before it is returned",
    ),
    "lazy statistics": (
        lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.LazyBatchNorm1d(affine=False), nn.Linear(8, 1)),
        "Task.model: 1.running_mean has no shape before the first batch; initialize it in the factory, by calling the "
        "model on an example before it is returned",
    ),
    "complex": (
        Complex,
        "Task.model: weight is complex, and an optimizer's state is real; make it a real parameter [..., 2], of which "
        "the model takes torch.view_as_complex",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("look", [check_task, lambda task: Trainer(task, epochs=1)], ids=["check_task", "Trainer"])
def test_parameters_without_a_shape_or_a_real_value_are_refused_in_one_line(name, look):
    model, message = REFUSED[name]
    with pytest.raises(TaskError) as caught:
        look(make_task(model))
    assert str(caught.value) == message


def test_a_lazy_model_that_was_called_in_its_factory_trains(mode):
    def build():
        model = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(1))
        model(torch.zeros(1, FEATURES))
        return model

    task = make_task(build)
    assert curve(task, [settings(), settings(0.02, 1)], mode=mode)[0] == same(plain_curve(task, settings()))

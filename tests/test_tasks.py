import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import momentum_tuner
import momentum_tuner.tasks.task as task_module
from momentum_tuner import tasks
from momentum_tuner.errors import TaskError
from momentum_tuner.tasks import (
    BUILT_IN,
    Task,
    check_task,
    digits_cnn,
    digits_mlp,
    digits_rnn,
    digits_transformer,
    double_well,
    quadratic,
    rosenbrock,
)

torch.set_num_threads(1)


def _mean_square(model, batch):
    return (model(batch[0])[:, 0] - batch[1]).square().mean()


def _data(rows=10):
    return TensorDataset(torch.arange(rows * 3.0).reshape(rows, 3), torch.ones(rows))


def _task(**changes):
    fields = dict(model=lambda: nn.Linear(3, 1), loss=_mean_square, train=_data(), valid=_data(4))
    return Task(**(fields | changes))


def _landscape(**changes):
    fields = dict(model=lambda: nn.Linear(3, 1), loss=lambda model, batch: model.weight.square().sum())
    return Task(**(fields | dict(steps_per_epoch=5) | changes))


class _Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(2, 3), torch.ones(2))] * 4)


class _Examples(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return torch.zeros(3), torch.ones(())


# --- Task


def test_a_task_keeps_a_copy_of_its_metrics_that_nobody_can_change():
    metrics = {"accuracy": _mean_square}
    task = _task(metrics=metrics)
    metrics["other"] = _mean_square
    assert dict(task.metrics) == {"accuracy": _mean_square}
    with pytest.raises(TypeError):
        task.metrics["other"] = _mean_square


def test_tasks_do_not_share_their_empty_metrics():
    assert _task().metrics == {}
    assert _task().metrics is not _task().metrics


def test_the_model_factory_is_not_called_by_the_constructor():
    calls = []
    _task(model=lambda: calls.append(1))
    assert calls == []


@pytest.mark.parametrize(
    "data",
    [
        _data(),
        DataLoader(_data(), batch_size=2),
        [(torch.zeros(2, 3), torch.ones(2))],
        ((torch.zeros(2, 3), torch.ones(2)),),
    ],
    ids=["tensors", "loader", "list", "tuple of batches"],
)
def test_data_that_can_be_iterated_every_epoch_is_taken(data):
    check_task(_task(train=data, valid=data))


def test_an_iterable_without_a_length_is_taken_with_its_steps():
    check_task(_task(train=DataLoader(_Stream(), batch_size=None), valid=_Stream(), steps_per_epoch=4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model=nn.Linear(3, 1)), "Task.model is a model, but must build one: write model=lambda: Net(...)"),
        (dict(model=None), "Task.model must be callable, not NoneType"),
        (dict(loss="mse"), "Task.loss must be callable, not str"),
        (dict(metrics=[_mean_square]), "Task.metrics must map names to functions, not be list"),
        (dict(metrics={"top 5": _mean_square}), "Task.metrics: 'top 5' is not a name; use letters, digits and"),
        (dict(metrics={3: _mean_square}), "Task.metrics: 3 is not a name; use letters, digits and underscores"),
        (dict(metrics={"loss": _mean_square}), "Task.metrics: 'loss' is taken by the loss itself; give the metric"),
        (dict(metrics={"accuracy": 1.0}), "Task.metrics['accuracy'] must be callable, not float"),
        (dict(valid=None), "Task.valid is missing: a task with training data needs validation data"),
        (dict(train=None), "Task.train is missing: a task with validation data needs training data"),
        (dict(train=None, valid=None), "Task.steps_per_epoch is missing: a landscape has no data to count"),
        (dict(train=TensorDataset(torch.zeros(0, 3), torch.zeros(0))), "Task.train is empty"),
        (dict(train=TensorDataset()), "Task.train is empty"),
        (dict(valid=[]), "Task.valid is empty"),
        (dict(valid=()), "Task.valid is empty"),
        (dict(train=iter([1])), "Task.train is a one-shot iterator (list_iterator), empty after one epoch"),
        (dict(valid=(i for i in [1])), "Task.valid is a one-shot iterator (generator), empty after one epoch"),
        (dict(train=torch.zeros(3, 3)), "Task.train is a tensor: wrap it, TensorDataset(x, y)"),
        (dict(train=(torch.zeros(3), torch.zeros(3))), "Task.train is a tuple of tensors: wrap it, TensorDataset"),
        (dict(train=_Examples()), "Task.train is a Dataset of single examples: wrap it in a DataLoader"),
        (dict(train=7), "Task.train must be a TensorDataset or an iterable of batches, not int"),
        (dict(train={"x": 1}), "Task.train must be a TensorDataset or an iterable of batches, not dict"),
        (dict(train=_Stream()), "Task.steps_per_epoch is missing: Task.train has no len() to count an epoch by"),
        (dict(train=DataLoader(_Stream())), "Task.steps_per_epoch is missing: Task.train has no len() to count"),
        (dict(train=[1, 2], steps_per_epoch=3), "Task.steps_per_epoch is 3, but Task.train has only 2 batches"),
        (dict(steps_per_epoch=0), "Task.steps_per_epoch must be a positive integer, not 0"),
        (dict(steps_per_epoch=2.5), "Task.steps_per_epoch must be a positive integer, not 2.5"),
        (dict(steps_per_epoch=True), "Task.steps_per_epoch must be a positive integer, not True"),
        (dict(optimum=torch.zeros(4)), "Task.optimum is for a landscape: a task with data has no known optimum"),
    ],
)
def test_a_wrong_field_is_refused_in_one_line(changes, message):
    with pytest.raises(TaskError) as caught:
        _task(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("optimum", "message"),
    [
        ([0.0], "Task.optimum must be a floating-point tensor [parameters], not list"),
        (torch.zeros(2, 2), "Task.optimum must be a floating-point tensor [parameters], not shape [2, 2]"),
        (torch.zeros(4, dtype=torch.int64), "Task.optimum must be a floating-point tensor [parameters]"),
        (torch.tensor([0.0, float("nan")]), "Task.optimum has values that are not finite"),
    ],
)
def test_a_wrong_optimum_is_refused(optimum, message):
    with pytest.raises(TaskError) as caught:
        _landscape(optimum=optimum)
    assert message in str(caught.value)


# --- check_task


def test_a_usable_task_passes_and_leaves_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    check_task(_task(model=lambda: nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5))))
    assert torch.equal(torch.rand(3), expected)


def test_the_check_builds_the_same_model_whatever_the_random_state():
    seen = []

    def model():
        seen.append(nn.Linear(3, 1))
        return seen[-1]

    for seed in (1, 2):
        torch.manual_seed(seed)
        check_task(_task(model=model))
    assert len(seen) == 2
    assert torch.equal(seen[0].weight, seen[1].weight)


def _no_gradient():
    return nn.Linear(3, 1).requires_grad_(False)


def _explode(*_):
    raise ValueError("two\nlines of  trouble")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (_task(model=lambda: None), "Task.model must return a torch.nn.Module, not NoneType"),
        (_task(model=nn.ReLU), "Task.model has no trainable parameters"),
        (_task(model=_no_gradient), "Task.model has no trainable parameters"),
        (
            _task(loss=lambda model, batch: model(batch[0])),
            "Task.loss must return a scalar, not shape [10, 1]: return its mean",
        ),
        (_task(loss=lambda model, batch: 1.0), "Task.loss must return a scalar tensor, not float"),
        (
            _task(loss=lambda model, batch: model(batch[0]).sum().long()),
            "Task.loss must return a floating-point scalar, not torch.int64",
        ),
        (
            _task(loss=lambda model, batch: model(batch[0]).mean().detach()),
            "Task.loss does not depend on the model's parameters: it has no gradient",
        ),
        (
            _task(loss=lambda model, batch: torch.ones((), requires_grad=True) * 2),
            "Task.loss does not depend on the model's parameters: it has no gradient",
        ),
        (
            _task(loss=lambda model, batch: model(batch[0]).mean() / 0),
            "on the first batch, before any step",
        ),
        (_landscape(optimum=torch.zeros(3)), "Task.optimum has 3 values, the model 4 parameters"),
        (
            _task(metrics={"hits": lambda model, batch: model(batch[0])}),
            "Task.metrics['hits'] must return a scalar, not shape [4, 1]: return its mean",
        ),
        (
            _task(metrics={"hits": lambda model, batch: torch.tensor(True)}),
            "Task.metrics['hits'] must return a floating-point scalar, not torch.bool",
        ),
        (_task(train=_Stream(), valid=_data(), steps_per_epoch=1, model=_explode), "Task.model raised ValueError"),
        (_task(loss=_explode), "Task.loss raised ValueError: two lines of trouble ("),
        (_task(metrics={"hits": _explode}), "Task.metrics['hits'] raised ValueError: two lines of trouble ("),
    ],
)
def test_a_task_that_cannot_be_trained_is_refused_in_one_line(task, message):
    with pytest.raises(TaskError) as caught:
        check_task(task)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_the_users_code_raises_is_placed_in_the_users_file_not_in_torch():
    task = _task(model=lambda: nn.Linear(4, 1))  # the data has 3 features
    with pytest.raises(TaskError) as caught:
        check_task(task)
    line = _mean_square.__code__.co_firstlineno + 1
    assert str(caught.value).startswith("Task.loss raised RuntimeError: mat1 and mat2 shapes cannot be multiplied")
    assert str(caught.value).endswith(f"({__file__}:{line})")


def test_a_task_that_is_itself_installed_is_placed_in_its_own_file_too(monkeypatch):
    monkeypatch.setattr(task_module, "_INSTALLED", (*task_module._INSTALLED, Path(__file__).parent))
    with pytest.raises(TaskError) as caught:
        check_task(_task(model=lambda: nn.Linear(4, 1)))
    line = _mean_square.__code__.co_firstlineno + 1
    assert str(caught.value).endswith(f"({__file__}:{line})")


def test_an_iterable_that_yields_nothing_is_refused():
    class Nothing(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(TaskError, match=r"^Task\.valid yields no batch$"):
        check_task(_task(valid=Nothing()))


def test_a_loss_that_ignores_some_parameters_passes():
    check_task(_landscape())  # the bias is not in the loss


def test_metrics_see_the_model_in_eval_mode_and_the_loss_in_train_mode():
    modes = []

    def loss(model, batch):
        modes.append(model.training)
        return _mean_square(model, batch)

    def metric(model, batch):
        modes.append(model.training)
        return torch.ones(())

    check_task(_task(loss=loss, metrics={"one": metric}))
    assert modes == [True, False, False]


# --- landscapes


def _theta(task):
    (theta,) = task.model().parameters()
    return theta


@pytest.mark.parametrize("spectrum", ["log", "linear", "ends"])
def test_the_gradient_of_the_quadratic_is_eigenvalues_times_theta(spectrum):
    task = quadratic(dim=7, kappa=30.0, smallest=0.5, spectrum=spectrum, start="random")
    model = task.model()
    task.loss(model, None).backward()
    middle = {
        "log": [0.5 * 30 ** (i / 6) for i in range(7)],
        "linear": [0.5 + 14.5 * i / 6 for i in range(7)],
        "ends": [0.5, 0.5, 0.5, 15.0, 15.0, 15.0, 15.0],
    }[spectrum]
    expected = torch.tensor(middle, dtype=torch.float64) * model.theta.detach()
    torch.testing.assert_close(model.theta.grad, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("spectrum", ["log", "linear", "ends"])
@pytest.mark.parametrize("kappa", [1.0, 2.8, 10.0, 1e6 / 3])
def test_both_ends_of_the_quadratics_spectrum_are_exact(spectrum, kappa):
    eigenvalues = quadratic(dim=5, kappa=kappa, smallest=0.3, spectrum=spectrum).model().eigenvalues
    assert eigenvalues.dtype == torch.float64
    assert eigenvalues.min() == 0.3
    assert eigenvalues.max() == kappa * 0.3


def test_the_quadratic_starts_with_equal_shares_of_all_modes_at_distance_one():
    theta = _theta(quadratic(dim=16))
    assert theta.dtype == torch.float64
    assert theta.tolist() == [0.25] * 16


def test_a_random_start_follows_the_seed_and_a_fixed_one_does_not():
    def starts(task):
        thetas = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            thetas.append(_theta(task))
        return torch.equal(thetas[0], thetas[1]), torch.equal(thetas[0], thetas[2])

    assert starts(quadratic(start="random")) == (True, False)
    assert starts(rosenbrock(jitter=0.1)) == (True, False)
    assert starts(double_well(jitter=0.1)) == (True, False)
    assert starts(quadratic()) == starts(rosenbrock()) == starts(double_well()) == (True, True)


def test_the_random_start_and_the_jitter_have_the_scale_that_they_say():
    torch.manual_seed(0)
    theta = _theta(quadratic(dim=100_000, start="random"))
    assert theta.square().sum().item() == pytest.approx(1, rel=0.02)
    shift = _theta(rosenbrock(dim=100_000, jitter=0.3)) - _theta(rosenbrock(dim=100_000))
    assert shift.std().item() == pytest.approx(0.3, rel=0.02)


@pytest.mark.parametrize("dim", [2, 5])
def test_rosenbrock_and_its_gradient_equal_scipys(dim):
    from scipy.optimize import rosen, rosen_der

    task = rosenbrock(dim=dim, jitter=0.5)
    model = task.model()
    loss = task.loss(model, None)
    loss.backward()
    theta = model.theta.detach().numpy()
    assert loss.item() == pytest.approx(rosen(theta), rel=1e-12)
    np.testing.assert_allclose(model.theta.grad, rosen_der(theta), rtol=1e-12)


def test_rosenbrock_starts_at_the_standard_point():
    task = rosenbrock(dim=4)
    assert _theta(task).tolist() == [-1.2, 1, -1.2, 1]
    assert rosenbrock().loss(rosenbrock().model(), None).item() == pytest.approx(24.2)


@pytest.mark.parametrize("build", [quadratic, partial(rosenbrock, dim=4), double_well, partial(double_well, deep=1.3)])
def test_a_landscapes_loss_and_gradient_vanish_at_its_optimum(build):
    task = build()
    model = task.model()
    with torch.no_grad():
        model.theta.copy_(task.optimum)
    loss = task.loss(model, None)
    loss.backward()
    assert abs(loss.item()) < 1e-15
    assert model.theta.grad.abs().max() < 1e-14
    check_task(task)


def _height(task, x):
    model = task.model()
    with torch.no_grad():
        model.theta.fill_(x)
    loss = task.loss(model, None)
    (slope,) = torch.autograd.grad(loss, model.theta)
    return loss.item(), slope.item()


@pytest.mark.parametrize(("barrier", "deep"), [(1.0, 2.0), (0.3, 1.5), (5.0, 4.0)])
def test_the_double_well_has_its_minima_and_its_barrier_where_it_says(barrier, deep):
    task = double_well(barrier=barrier, deep=deep, start=-2.0)
    shallow, shallow_slope = _height(task, -1.0)
    top, top_slope = _height(task, 0.0)
    bottom, bottom_slope = _height(task, deep)
    assert [shallow_slope, top_slope, bottom_slope] == pytest.approx([0, 0, 0], abs=1e-12)
    assert top - shallow == pytest.approx(barrier)
    assert bottom == 0
    heights = [_height(task, x)[0] for x in np.linspace(-3, deep + 2, 301)]
    assert min(heights) >= 0
    assert task.optimum.tolist() == [deep]


def test_the_numbers_in_the_double_well_study_are_right():
    task = double_well()
    assert [_height(task, x)[0] for x in (-1.0, 0.0)] == pytest.approx([10.71875, 11.71875])
    assert _height(task, _theta(task).item())[0] > 11.72  # the start is above the barrier
    curvature = (_height(task, 2.5 + 1e-6)[1] - _height(task, 2.5 - 1e-6)[1]) / 2e-6
    assert 1 / curvature == pytest.approx(0.057, abs=1e-3)


def _descend(task, learning_rates, momentum, steps=2000):
    """The end of a descent at each learning rate `[n]`, by the landscape's own gradient."""
    base = task.model()
    gradient = vmap(torch.func.grad(lambda theta: functional_call(base, {"theta": theta}, ())))
    theta = base.theta.detach().expand(len(learning_rates), 1).clone()
    velocity = torch.zeros_like(theta)
    for _ in range(steps):
        slope = gradient(theta)
        velocity = momentum * velocity + slope
        theta = theta - learning_rates[:, None] * velocity
    return theta[:, 0]


def test_gradient_descent_ends_in_the_shallow_well_and_at_no_learning_rate_in_the_deep_one():
    ends = _descend(double_well(), torch.logspace(-3, 0, 601, dtype=torch.float64), momentum=0.0)
    assert ends[:401].tolist() == pytest.approx([-1.0] * 401, abs=1e-4)  # up to 0.1
    assert not ends[ends.isfinite()].gt(0).any()


def test_momentum_rolls_over_the_barrier_into_the_deep_well():
    learning_rates = torch.tensor([0.01, 0.04, 0.06], dtype=torch.float64)
    ends = _descend(double_well(), learning_rates, momentum=0.9)
    assert ends.tolist() == pytest.approx([-1, 2.5, 2.5], abs=1e-6)


# --- digits


def test_the_split_is_disjoint_stratified_and_whole():
    from sklearn.datasets import load_digits

    task = digits_mlp()
    x, y = task.train.tensors
    x_valid, y_valid = task.valid.tensors
    assert (x.shape, y.shape) == ((1437, 8, 8), (1437,))
    assert (x_valid.shape, y_valid.shape) == ((360, 8, 8), (360,))
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert (x.min(), x.max()) == (0, 1)
    share = torch.bincount(y_valid) / (torch.bincount(y) + torch.bincount(y_valid))
    assert share.tolist() == pytest.approx([0.2] * 10, abs=0.005)
    rows = sorted([*x.flatten(1).tolist(), *x_valid.flatten(1).tolist()])
    assert rows == sorted((load_digits().data / 16).tolist())


def test_the_split_is_the_one_that_scikit_learn_draws():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    drawn = train_test_split(digits.images / 16, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
    task = digits_mlp()
    for tensor, expected in zip(
        (*task.train.tensors, *task.valid.tensors), (drawn[0], drawn[2], drawn[1], drawn[3]), strict=True
    ):
        assert torch.equal(tensor, torch.tensor(expected, dtype=tensor.dtype))


def test_the_digits_are_found_where_another_scikit_learn_keeps_them(monkeypatch):
    from momentum_tuner.tasks import digits

    images, labels = digits._images()
    monkeypatch.setattr(Path, "exists", lambda path: False)
    again = digits._images()
    assert (images == again[0]).all() and (labels == again[1]).all()


def test_the_split_does_not_depend_on_the_seed():
    from momentum_tuner.tasks.digits import _digits

    before = _digits()[1].tensors
    torch.manual_seed(7)
    np.random.seed(7)
    _digits.cache_clear()
    after = _digits()[1].tensors
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_digits_are_loaded_once():
    assert digits_mlp().train is digits_rnn().train


@pytest.mark.parametrize(
    ("task", "parameters"),
    [
        (digits_mlp(), 64 * 64 + 64 + 64 * 64 + 64 + 64 * 10 + 10),
        (digits_mlp(hidden=5, layers=1), 64 * 5 + 5 + 5 * 10 + 10),
        (digits_cnn(channels=4), 9 * 4 + 4 + 9 * 4 * 8 + 8 + 4 * 8 * 10 + 10),
        (digits_cnn(channels=4, batch_norm=True), 9 * 4 + 8 + 9 * 4 * 8 + 16 + 4 * 8 * 10 + 10),
        (digits_rnn(hidden=6), 6 * (8 + 6 + 2) + 6 * 10 + 10),
        (digits_rnn(cell="lstm", hidden=6), 4 * 6 * (8 + 6 + 2) + 6 * 10 + 10),
        (digits_rnn(cell="gru", hidden=6), 3 * 6 * (8 + 6 + 2) + 6 * 10 + 10),
        (
            digits_transformer(width=6, heads=3, layers=2),
            (8 * 6 + 6) + 8 * 6 + 2 * (4 * (6 * 6 + 6) + 2 * 6 * 12 + 12 + 6 + 4 * 6) + 6 * 10 + 10,
        ),
    ],
)
def test_a_digits_model_has_the_size_that_its_options_say_and_ten_outputs(task, parameters):
    model = task.model()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(task.train[:3][0]).shape == (3, 10)
    check_task(task)


def test_accuracy_is_the_share_of_right_answers():
    class Fixed(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.one_hot(torch.tensor([1, 2, 3, 3]), 10).float()

    batch = (torch.zeros(4, 8, 8), torch.tensor([1, 2, 3, 4]))
    assert digits_mlp().metrics["accuracy"](Fixed(), batch).item() == 0.75


def test_the_recurrent_networks_read_the_rows_in_order():
    torch.manual_seed(0)
    model = digits_rnn(cell="gru").model()
    image = torch.rand(1, 8, 8)
    hidden = torch.zeros(1, 32)
    cell = nn.GRUCell(8, 32)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in model.recurrent.state_dict().items()})
    for row in range(8):
        hidden = cell(image[:, row], hidden)
    torch.testing.assert_close(model(image), model.head(hidden))


def test_the_transformer_drops_units_in_training_only_and_tells_rows_apart():
    torch.manual_seed(0)
    model = digits_transformer(dropout=0.5).model()
    image = torch.rand(1, 8, 8)
    assert not torch.equal(model(image), model(image))
    model.eval()
    assert torch.equal(model(image), model(image))
    assert not torch.allclose(model(image), model(image.flip(1)), atol=1e-4)


class _Loss(nn.Module):
    def __init__(self, task):
        super().__init__()
        self.model = task.model()
        self.loss = task.loss

    def forward(self, batch):
        return self.loss(self.model, batch)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "task",
    [
        digits_mlp(),
        digits_cnn(),
        digits_cnn(batch_norm=True),
        digits_rnn(),
        digits_rnn(cell="lstm"),
        digits_rnn(cell="gru"),
        digits_transformer(),
        quadratic(start="random"),
        rosenbrock(jitter=0.1),
        double_well(jitter=0.1),
    ],
    ids=["mlp", "cnn", "batch-norm", "rnn", "lstm", "gru", "transformer", "quadratic", "rosenbrock", "double-well"],
)
def test_a_stacked_model_gives_the_solo_gradient_and_buffers(task):
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(_Loss(task))
    batch = None if task.train is None else task.train[:32]
    parameters, buffers = stack_module_state(models)

    def loss(parameters, buffers):
        return functional_call(models[0], (parameters, buffers), (batch,)), buffers

    gradients, (losses, after) = vmap(grad_and_value(loss, has_aux=True))(parameters, buffers)
    for slot, model in enumerate(models):
        solo = model(batch)
        solo.backward()
        torch.testing.assert_close(losses[slot], solo)
        for name, parameter in model.named_parameters():
            difference = (gradients[name][slot] - parameter.grad).norm() / parameter.grad.norm()
            assert difference < 1e-5, name
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(after[name][slot], buffer)
            assert not torch.equal(buffer, torch.zeros_like(buffer)), name  # batch norm has counted


# --- options and exports


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (quadratic, dict(spectrum="cubic"), "spectrum: Input should be 'log', 'linear' or 'ends', not 'cubic'"),
        (quadratic, dict(start="zeros"), "start: Input should be 'ones' or 'random', not 'zeros'"),
        (quadratic, dict(kappa=0.5), "kappa: Input should be greater than or equal to 1, not 0.5"),
        (quadratic, dict(kappa=float("inf")), "kappa: Input should be a finite number, not inf"),
        (quadratic, dict(smallest=0.0), "smallest: Input should be greater than 0, not 0.0"),
        (quadratic, dict(dim=1), "dim: kappa 100 needs two different eigenvalues, so dim should be 2 or more"),
        (quadratic, dict(dim="9"), "dim: Input should be a valid integer, not '9'"),
        (rosenbrock, dict(dim=1), "dim: Input should be greater than or equal to 2, not 1"),
        (rosenbrock, dict(jitter=-1.0), "jitter: Input should be greater than or equal to 0, not -1.0"),
        (double_well, dict(deep=1.0), "deep: Input should be greater than 1, not 1.0"),
        (double_well, dict(start=0.0), "start: Input should be less than -1, not 0.0"),
        (digits_mlp, dict(hidden=0), "hidden: Input should be greater than or equal to 1, not 0"),
        (digits_mlp, dict(layers=True), "layers: Input should be a valid integer, not True"),
        (digits_cnn, dict(batch_norm="yes"), "batch_norm: Input should be a valid boolean, not 'yes'"),
        (digits_rnn, dict(cell="mamba"), "cell: Input should be 'rnn', 'lstm' or 'gru', not 'mamba'"),
        (digits_transformer, dict(heads=5), "heads: must divide width (32), not 5"),
        (digits_transformer, dict(dropout=1.0), "dropout: Input should be less than 1, not 1.0"),
        (digits_rnn, dict(cell="x", hidden=0), "not 'x'; hidden: Input should be greater than or equal to 1, not 0"),
    ],
)
def test_a_wrong_option_is_refused_with_what_is_allowed(build, options, message):
    with pytest.raises(TaskError) as caught:
        build(**options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_integer_is_a_fine_float():
    assert quadratic(kappa=10).model().eigenvalues.max() == 10


def test_the_package_exports_the_task_and_every_built_in():
    assert momentum_tuner.Task is Task
    digits = {"digits_mlp", "digits_cnn", "digits_rnn", "digits_transformer"}
    assert digits | {"quadratic", "rosenbrock", "double_well"} == set(BUILT_IN)
    assert all(callable(getattr(tasks, name)) for name in BUILT_IN)
    assert set(tasks.__all__) <= set(dir(tasks))
    assert all(getattr(tasks, name) is not None for name in tasks.__all__)
    assert isinstance(momentum_tuner.__version__, str)
    assert set(momentum_tuner.__all__) <= set(dir(momentum_tuner))
    for module in (momentum_tuner, tasks):
        with pytest.raises(AttributeError, match="has no attribute 'Tusk'"):
            _ = module.Tusk


def test_importing_the_package_and_the_loader_loads_no_torch():
    heavy = "{'torch', 'numpy', 'sklearn', 'pydantic', 'optuna', 'mlflow'}"
    code = (
        "import sys, momentum_tuner, momentum_tuner.tasks, momentum_tuner.tasks.loader; "
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

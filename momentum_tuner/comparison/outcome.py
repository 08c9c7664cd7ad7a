"""What a comparison says, as plain frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from momentum_tuner.database import plain_number


@dataclass(frozen=True)
class Contestant:
    """One optimizer's best setting, over the confirmation seeds.

    Attributes:
        optimizer: whose setting it is.
        learning_rate: of the setting.
        momentum: of the setting; 0 for plain SGD, None for an optimizer that has none.
        settings: all its hyperparameters.
        trial: the search trial that found it.
        budget_steps: optimizer steps of a whole trial of the setting.
        seeds: confirmation trials that have ended in a result.
        steps_to_target: geometric mean over seeds, in optimizer steps; a miss counts as twice the budget's steps.
        epochs_to_target: the same in epochs, which are the same work whatever the batch size.
        miss_rate: share of seeds that never reached the target.
        divergence_rate: share of seeds that diverged.
        best_valid_loss: mean over seeds of each trial's smallest validation loss; of the untrained model for one that
            diverged.
        seed_std: standard deviation of the objective over seeds; None with fewer than two.
        mean_valid_loss: mean over seeds of the anytime measure.
        oscillation: mean over seeds.
        spikes: mean over seeds.
        layer_grad_ratio: mean over seeds.
        sharpness: mean over the seeds where it was measured.
        stability_margin: the same.
        stable_width: decades of learning rate within 5% of the best objective, over the search trials.
        lr_sensitivity: mean loss that a badly chosen learning rate costs, over the search trials.
    """

    optimizer: str
    learning_rate: float
    momentum: float | None
    settings: Mapping[str, Any]
    trial: int
    budget_steps: int
    seeds: int
    steps_to_target: float | None
    epochs_to_target: float | None
    miss_rate: float | None
    divergence_rate: float | None
    best_valid_loss: float | None
    seed_std: float | None
    mean_valid_loss: float | None
    oscillation: float | None
    spikes: float | None
    layer_grad_ratio: float | None
    sharpness: float | None
    stability_margin: float | None
    stable_width: float | None
    lr_sensitivity: float | None


@dataclass(frozen=True)
class Difference:
    """A paired difference of a stability measure, a minus b, with its 95% interval."""

    measure: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Pair:
    """Two contestants compared seed by seed.

    Attributes:
        a: the one that is faster, or equal.
        b: the other.
        seeds: how many both have.
        speed_ratio: geometric mean over seeds of steps_to_target(a) / steps_to_target(b), of epochs where that is the
            comparison's unit; below 1, a is faster.
        low: lower end of its 95% interval.
        high: upper end.
        p: of the paired sign-flip permutation test, Holm-corrected over the pairs.
        verdict: in words.
        smallest_ratio: the ratio nearest to 1 that this many seeds could have shown, below 1.
        stability: differences of `oscillation`, `spikes` and `divergence_rate`.
    """

    a: str
    b: str
    seeds: int
    speed_ratio: float
    low: float
    high: float
    p: float
    verdict: str
    smallest_ratio: float | None
    stability: tuple[Difference, ...]


@dataclass(frozen=True)
class FrontPoint:
    """A search trial of a study with two aims that no other of its optimizer is better than in both.

    Attributes:
        optimizer: whose.
        trial: its number.
        learning_rate: of its setting.
        momentum: of its setting; 0 for plain SGD, None for an optimizer that has none.
        values: the two aims by name, as measured in the search.
    """

    optimizer: str
    trial: int
    learning_rate: float
    momentum: float | None
    values: Mapping[str, float]


@dataclass(frozen=True)
class Comparison:
    """The comparison of a study's contestants, best first, and of their pairs.

    Attributes:
        study: the study's name.
        phase: of the study; before `done` it is of what there is so far.
        target: the value to reach; None while it cannot be said.
        target_metric: of which measure, such as `valid_loss`.
        maximize: whether the target is reached from below.
        reference: the textbook contestant that `auto` targets come from.
        budget: `trials`, `epochs` and `seeds` of each contestant, equal for all; `steps`, the most that one has.
        optimizers: the contestants, the fastest first.
        pairs: all pairs, in the order of the contestants.
        notes: what a reader must know to trust the numbers, such as a contestant that has no completed trial.
        front: with two aims each optimizer's Pareto front; the first of an optimizer is what was confirmed.
        unit: what speed is compared in: `epochs` where the contestants' budgets differ in steps, as with a searched
            batch size, so that a step is not the same work for all.
    """

    study: str
    phase: str
    target: float | None
    target_metric: str
    maximize: bool
    reference: str | None
    budget: Mapping[str, int]
    optimizers: tuple[Contestant, ...]
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]
    front: tuple[FrontPoint, ...] = ()
    unit: Literal["steps", "epochs"] = "steps"

    def to_target(self, contestant: Contestant) -> float | None:
        """How much a contestant needs to reach the target, in the unit that speed is compared in."""
        return contestant.epochs_to_target if self.unit == "epochs" else contestant.steps_to_target

    def flat(self) -> dict[str, Any]:
        """As plain JSON values."""
        found: dict[str, Any] = plain_values(asdict(self))
        return found


def plain_values(value: Any) -> Any:
    """Mappings, lists and numbers as JSON has them."""
    if isinstance(value, Mapping):
        return {name: plain_values(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(part) for part in value]
    return plain_number(value)

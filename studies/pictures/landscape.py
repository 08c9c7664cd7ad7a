"""Draw the landscape that a study has searched: python studies/pictures/landscape.py digits-mlp landscape.png

It reads Optuna's studies of momentum and Nesterov in sqlite:///momentum_tuner.db.
"""

import sys

import matplotlib
import optuna

matplotlib.use("agg")
from matplotlib import pyplot as plt

STORAGE = "sqlite:///momentum_tuner.db"


def main(study: str, picture: str) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for axis, optimizer in zip(axes, ("momentum", "nesterov"), strict=True):
        trials = optuna.load_study(study_name=f"{study}/{optimizer}", storage=STORAGE).trials
        complete = [t for t in trials if t.state.name == "COMPLETE"]
        start = max(t.value for t in complete)  # a diverged trial has the loss of the untrained model
        kinds = {
            "pruned": ([t for t in trials if t.state.name == "PRUNED"], "o", 26),
            "diverged": ([t for t in complete if t.value == start], "x", 46),
            "ran to the end": ([t for t in complete if t.value < start], "D", 60),
        }
        for name, (some, marker, size) in kinds.items():
            points = axis.scatter(
                [t.params["learning_rate"] for t in some],
                [t.params["one_minus_momentum"] for t in some],
                c=[t.value for t in some],
                s=size,
                marker=marker,
                cmap="viridis_r",
                norm=matplotlib.colors.LogNorm(0.08, 2.4),
                label=name,
                linewidths=1.6 if marker == "x" else 0.4,
                edgecolors=None if marker == "x" else "black",
            )
        axis.set(xscale="log", yscale="log", xlabel="learning rate", title=f"{study}: {optimizer}")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("1 - momentum")
    axes[1].legend(loc="lower left", framealpha=0.9)
    figure.colorbar(points, ax=axes, label="validation loss when the trial ended")
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Put the best trial's model into MLflow's registry: register."""

from __future__ import annotations

import click

from momentum_tuner.cli.completion import complete_optimizer
from momentum_tuner.cli.options import name_argument, open_database, parse_trust, storage_option, tracking_option


@click.command(epilog="Example: momentum-tuner register digits-mlp momentum")
@name_argument
@click.argument("optimizer", required=False, shell_complete=complete_optimizer)
@click.option("--device", metavar="auto|cpu|cuda:0", default="auto", show_default=True, help="What to train on.")
@click.option("--trust", metavar="PACKAGE", multiple=True, help="A package, or a task file, that may be imported.")
@storage_option
@tracking_option
def register(
    name: str, optimizer: str | None, device: str, trust: tuple[str, ...], storage: str, tracking_uri: str
) -> None:
    """Train the best trial again and register its model in MLflow, with the alias `champion`.

    Without OPTIMIZER it is the best of all. The model is exported without pickle; it is registered only if it trains
    as it was recorded.
    """
    from momentum_tuner.launcher import resolve_devices
    from momentum_tuner.tickets import find_study

    database = open_database(storage)
    study = find_study(database, name)
    chosen = resolve_devices(device)[0]
    from momentum_tuner.champion import register_champion
    from momentum_tuner.cli.tables import console

    with console(stderr=True).status(f"loading {study.spec.task.factory} ...") as status:
        found = register_champion(
            database,
            study,
            tracking_uri,
            optimizer=optimizer,
            device=chosen,
            trusted=parse_trust(trust),
            after_epoch=lambda epoch, last: status.update(f"epoch {epoch} of {last}"),
        )
    click.echo(f"Registered {found.name} version {found.version}: trial {found.trial} of {found.optimizer}.")
    click.echo(f'Load it with: mlflow.pytorch.load_model("{found.uri}")')

"""The command `compare`: the verdict."""

from __future__ import annotations

import json

import click

from momentum_tuner.cli.options import json_option, open_database, storage_option


@click.command(epilog="Example: momentum-tuner compare digits-mlp")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@storage_option
@json_option
def compare(names: tuple[str, ...], storage: str, as_json: bool) -> None:
    """Which optimizer is faster, how stable, and how sure that is, on seeds that the search has not seen.

    Several studies are shown side by side, with the share of them in which each optimizer is within a factor of the
    fastest.
    """
    from momentum_tuner.comparison import compare_study, performance_profile
    from momentum_tuner.tickets import find_study

    database = open_database(storage)
    studies = [find_study(database, name) for name in dict.fromkeys(names)]
    comparisons = [compare_study(database, study) for study in studies]
    if as_json and len(comparisons) == 1:
        click.echo(json.dumps(comparisons[0].flat()))
    elif as_json:
        profile = performance_profile(comparisons)
        click.echo(json.dumps({"studies": [c.flat() for c in comparisons], "profile": profile.flat()}))
    else:
        from momentum_tuner.cli.comparison_tables import print_comparison, print_comparisons
        from momentum_tuner.cli.tables import console

        if len(comparisons) == 1:
            print_comparison(console(), comparisons[0])
        else:
            print_comparisons(console(), comparisons, performance_profile(comparisons))

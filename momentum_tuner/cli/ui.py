"""Commands about MLflow: ui, publish."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec

import click

from momentum_tuner.cli.options import name_argument, open_database, storage_option, tracking_option


@click.command(epilog="Example: momentum-tuner ui --port 5001")
@storage_option
@tracking_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True, help="Port of the MLflow UI.")
@click.option("--dashboard", is_flag=True, help="Also start optuna-dashboard, on the next port.")
def ui(storage: str, tracking_uri: str, host: str, port: int, dashboard: bool) -> None:
    """The MLflow UI on the right store."""
    from momentum_tuner.errors import MissingExtraError, TrackingError
    from momentum_tuner.tracking import check_tracking_uri, quiet_mlflow

    if dashboard and find_spec("optuna_dashboard") is None:
        raise MissingExtraError("--dashboard needs the extra 'dashboard': pip install 'momentum-tuner[dashboard]'")
    quiet_mlflow()
    # MLflow would start eight more processes for jobs, which a view of runs has none of.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    uri = check_tracking_uri(tracking_uri)
    commands: list[list[str]] = []
    if uri.startswith(("http://", "https://")):
        click.echo(f"MLflow: {uri} is a server already; open it in a browser")
    else:
        if uri.startswith("sqlite:///") and not os.path.exists(uri.removeprefix("sqlite:///")):
            raise TrackingError(
                f"there is no MLflow store {uri} yet; run a study first, or name another --tracking-uri"
            )
        commands.append(
            [
                sys.executable,
                "-m",
                "mlflow",
                "server",
                "--backend-store-uri",
                uri,
                "--host",
                host,
                "--port",
                str(port),
                "--workers",
                "1",
            ]
        )
        click.echo(f"MLflow: http://{host}:{port}")
    if dashboard:
        database = open_database(storage)
        commands.append([_beside_python("optuna-dashboard"), database.text, "--host", host, "--port", str(port + 1)])
        click.echo(f"Optuna dashboard: http://{host}:{port + 1}")
    if commands:
        click.echo("Ctrl-C stops.")
        _run_all(commands)


def _beside_python(program: str) -> str:
    """A program of this Python's environment, which need not be the active one."""
    return shutil.which(program, path=os.path.dirname(sys.executable)) or program


def _run_all(commands: list[list[str]]) -> None:
    """Run servers until one ends or Ctrl-C comes; then end all."""
    servers = [subprocess.Popen(command, start_new_session=True) for command in commands]

    def stop(*_: object) -> None:
        for server in servers:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGTERM)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    codes = [server.wait() for server in servers[:1]]
    stop()
    codes += [server.wait() for server in servers[1:]]
    if any(code > 0 for code in codes):
        sys.exit(1)


@click.command(epilog="Example: momentum-tuner publish digits-mlp")
@name_argument
@storage_option
@tracking_option
def publish(name: str, storage: str, tracking_uri: str) -> None:
    """Bring MLflow up to date from the database, or rebuild it where its store was deleted."""
    import uuid

    from momentum_tuner.errors import TrackingError, redact
    from momentum_tuner.tickets import find_study
    from momentum_tuner.tracking import Publisher, check_tracking_uri, short_reason

    database = open_database(storage)
    study = find_study(database, name)
    uri = check_tracking_uri(tracking_uri)
    publisher = Publisher(database, study, uri, f"publish-{uuid.uuid4().hex[:12]}")
    try:
        result = publisher.publish()
    except Exception as error:
        raise TrackingError(f"MLflow at {redact(uri)} does not answer: {short_reason(error)}") from error
    finally:
        publisher.close()
    if result.busy:
        raise TrackingError(f"another process publishes {name!r} now; try again in half a minute")
    if result.refused:
        raise TrackingError(f"MLflow does not take {result.refused} trial(s) of {name!r}; what it said stands above")
    click.echo(f"MLflow has all finished trials of {name}: {result.trials} brought up to date now.")

"""The command ``tailspan serve``."""

from __future__ import annotations

import os
from pathlib import Path

import click

from tailspan._net import is_loopback, read_secret_file
from tailspan._own_token import own_token
from tailspan.cli.options import config_option, service_option, settings_for
from tailspan.config.units import serve_token_file
from tailspan.errors import ConfigError

__all__ = ["serve"]

_TOKEN_VARIABLE = "TAILSPAN_SERVE_TOKEN"  # noqa: S105 - the variable's name, not a token


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    default=8798,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="Port to listen on; 0 takes a free one and prints it.",
)
@service_option
@click.option(
    "--token-file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help=f"File with the token that requests must carry. Without it: the environment variable {_TOKEN_VARIABLE}, or on "
    "loopback a token that is made at the first start.",
)
@click.option(
    "--no-token",
    is_flag=True,
    help="Require no token, on loopback only: every user of this machine can then read all logs and cancel all jobs.",
)
@config_option
def serve(
    host: str, port: int, service: str | None, token_file: Path | None, no_token: bool, config_path: Path | None
) -> None:
    """Serve jobs over HTTP, at http://HOST:PORT/server/v1.

    The `fused` client (1.1.2 to 2.9.5) and another Tailspan (a service of type "fused") can read, follow and
    cancel the jobs. Requests carry the token as "Authorization: Bearer TOKEN". Tailspan itself finds the token that
    this command makes on loopback, if the same user runs both.

    \b
    Example:
      tailspan serve --host 0.0.0.0 --port 8798 --token-file /run/secrets/tailspan
    """  # noqa: D301 - click wants the backspace character itself
    try:
        from tailspan.job_api import server
    except ModuleNotFoundError as missing:
        raise ConfigError(str(missing)) from missing
    from tailspan.services.registry import open_service

    token = _read_token(token_file)
    if no_token and token is not None:
        raise ConfigError(f"--no-token contradicts --token-file and {_TOKEN_VARIABLE}: remove one", key="token")
    settings = settings_for(config_path)
    name = service or settings.default_service
    made = None
    if token is None and not no_token and is_loopback(host):
        made = serve_token_file()
        token = own_token(made, instead="--token-file")

    def on_ready(url: str) -> None:
        click.echo(f"serving jobs of {name!r} at {url}", err=True)
        if made is not None:
            click.echo(f"requests need the token in {made}", err=True)

    server.serve(
        open_service(name, settings),
        host,
        port,
        token,
        on_ready=on_ready,
    )


def _read_token(path: Path | None) -> str | None:
    if path is None:
        token = os.environ.get(_TOKEN_VARIABLE)
        source = _TOKEN_VARIABLE
    else:
        source = str(path)
        token = read_secret_file(path, key="--token-file")
    if token is None:
        return None
    token = token.strip()
    if not token.isprintable() or not token or " " in token:
        raise ConfigError(f"{source} contains no token: expected one word without spaces", key="token_file")
    return token

"""The command ``tailspan serve``."""

from __future__ import annotations

import os
from pathlib import Path

import click

from tailspan._net import read_secret_file
from tailspan.cli.options import config_option, service_option, settings_for
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
    help=f"File with the token that requests must carry. Without it: the environment variable {_TOKEN_VARIABLE}.",
)
@config_option
def serve(host: str, port: int, service: str | None, token_file: Path | None, config_path: Path | None) -> None:
    """Serve jobs over HTTP, at http://HOST:PORT/server/v1.

    The `fused` client (1.1.2 to 2.9.5) and another Tailspan (a service of type "fused") can read, follow and
    cancel the jobs. Requests carry the token as "Authorization: Bearer TOKEN"; on loopback a token may be left out.

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
    settings = settings_for(config_path)
    name = service or settings.default_service
    server.serve(
        open_service(name, settings),
        host,
        port,
        token,
        on_ready=lambda url: click.echo(f"serving jobs of {name!r} at {url}", err=True),
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

"""The command ``tailspan``."""

from tailspan.cli.group import main

__all__ = ["main"]

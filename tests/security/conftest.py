"""The machine and the receiver of the end-to-end tests."""

from tests.e2e.conftest import collector, machine

__all__ = ["collector", "machine"]

"""Prefect 3: flow runs as jobs, their task runs as tasks.

Its API, the states of its runs and tasks, the order of its logs and its events belong here; nothing outside this
package may know them.
"""

from tailspan.services.prefect.service import PrefectOptions, PrefectService

__all__ = ["PrefectOptions", "PrefectService"]

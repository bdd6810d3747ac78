"""Airflow 3: DAG runs as jobs, their task instances as tasks.

Its API, the states of its runs and tasks and the order of its logs belong here; nothing outside this package may know
them.
"""

from tailspan.services.airflow.service import AirflowService

__all__ = ["AirflowService"]

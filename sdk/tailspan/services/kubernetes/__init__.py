"""Kubernetes: Jobs and those of CronJobs as jobs, containers of their pods as tasks.

Its API, the life of its jobs and pods and the way their logs are followed belong here; nothing outside this package
may know them.
"""

from tailspan.services.kubernetes.service import KubernetesService

__all__ = ["KubernetesService"]

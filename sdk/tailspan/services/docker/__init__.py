"""Containers of Docker or Podman as jobs; see `tailspan.services.docker.service`.

What reads the engine's API belongs here: ``wire`` decodes logs and states, ``streams`` follows containers and events.
Only ``service`` may send requests that change a container.
"""

from tailspan.services.docker.service import DockerOptions, DockerService

__all__ = ["DockerOptions", "DockerService"]

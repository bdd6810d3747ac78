"""Runs of systemd units as jobs; see `tailspan.services.systemd.service`.

What reads and understands the journal belongs here: ``entries`` and ``lines`` decode it, ``invocations`` has the life
of units, ``commands`` runs the programs, ``live`` follows the journal for all jobs. Only ``commands`` may run programs.
"""

from tailspan.services.systemd.service import SystemdOptions, SystemdService

__all__ = ["SystemdOptions", "SystemdService"]

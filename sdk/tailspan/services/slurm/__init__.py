"""Slurm batch jobs: state by the text of Slurm's programs, lines from the files that the jobs write.

`SlurmService` belongs here, with what reads the programs' output. Nothing here may depend on the JSON of these
programs, whose shape and values differ between versions.
"""

from __future__ import annotations

from tailspan.services.slurm.options import SlurmOptions
from tailspan.services.slurm.service import SlurmService

__all__ = ["SlurmOptions", "SlurmService"]

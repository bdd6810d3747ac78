"""Log files as jobs: of Nextflow, Snakemake, LSF, PBS, cron, and of whatever else only leaves a file.

`FilesService` belongs here, with its options and presets. Nothing here may read a log but through
`tailspan.services._log_file`, which other services share.
"""

from __future__ import annotations

from tailspan.services.files.options import FilesOptions
from tailspan.services.files.service import FilesService

__all__ = ["FilesOptions", "FilesService"]

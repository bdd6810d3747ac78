"""Runs of a Dagster webserver, or of Dagster+, as jobs; their steps are tasks.

Dagster's GraphQL API, and what becomes of its runs, steps, events and compute logs, belong here; nothing outside this
package may know them. Events have an exact cursor, and output is read by byte offset. Neither has ids for lines, so
they are made here: from content and position.

Source: the GraphQL API of Dagster 1.13.28, as measured; docs.dagster.io, "GraphQL API".
"""

from tailspan.services.dagster.service import DagsterOptions, DagsterService

__all__ = ["DagsterOptions", "DagsterService"]

"""Executes a notebook in a real kernel; runs in an environment with nbclient and ipykernel, without Tailspan.

    python notebook_kernel.py NOTEBOOK < "a JSON list of more cells" > "all that the front end receives, as JSON"

A cell that begins with ``# interrupt`` is interrupted once it displays something.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import nbformat
from nbclient import NotebookClient


class FrontEnd(NotebookClient):
    """A front end that records each message of a cell, updates included."""

    received: dict[int, list[dict[str, Any]]]
    interrupting: Any = None

    def process_message(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
        """Record a message, and interrupt the kernel where the cell asks for it."""
        kind, content = msg["msg_type"], msg["content"]
        if kind != "status":
            self.received.setdefault(cell_index, []).append({"type": kind, **content})
        if kind == "display_data" and cell.source.startswith("# interrupt"):
            self.interrupting = asyncio.ensure_future(self.km.interrupt_kernel())
        return super().process_message(msg, cell, cell_index)


def main() -> None:
    """Execute the cells, and write what each of them sent."""
    notebook = nbformat.read(sys.argv[1], 4)
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in json.load(sys.stdin)]
    front_end = FrontEnd(notebook, allow_errors=True, timeout=300, kernel_name="python3")
    front_end.received = {}
    front_end.execute()
    found = [
        {"source": cell.source, "received": front_end.received.get(place, [])}
        for place, cell in enumerate(notebook.cells)
        if cell.cell_type == "code"
    ]
    json.dump(found, sys.stdout)


main()

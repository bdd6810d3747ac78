"""Notebooks executed by a real kernel, with pandas: docs/notebook.ipynb, the examples of docs/python.md, and errors.

Left out: how front ends draw what they receive (JupyterLab, VS Code, Colab).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from tests.orchestrators.harness import programs_of

pytestmark = [pytest.mark.services, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
ANSI = re.compile(r"\x1b\[[0-9;]*m")
FAILS = {
    "unknown job": "job_list(1)[0].job_id\njob_wait_for_job('no-such-job')",
    "wrong type": "job_wait_for_job(job, timeout='3m')",
    "unknown argument": "job_submit('true', nmae='x')",
    "iterator": "from tailspan import Client\nlist(Client().iter_logs('no-such-job'))",
    "await": "from tailspan import AsyncJobClient\nawait AsyncJobClient().get_status('no-such-job')",
}
INTERRUPTED = "# interrupt\nlong = job_submit('sleep 600')\njob_wait_for_job(long)"
AFTER = "from tailspan import job_cancel\nstate = long.get_status().state\njob_cancel(long)\nprint(state)"
AWAITED = "async with AsyncJobClient() as client:\n    await client.wait_for_job(job_submit('sleep 1'))"


@pytest.fixture(scope="module")
def bin_directory():
    """Return where the programs of the environment are."""
    return programs_of("notebook", "jupyter-kernelspec")


@pytest.fixture(scope="module")
def environment(bin_directory, tmp_path_factory):
    """Return an environment in which its Python finds this Tailspan, and what that needs, after its own packages."""
    home = tmp_path_factory.mktemp("home")
    hook = home / "hook"
    hook.mkdir()
    paths = [str(ROOT / "sdk"), sysconfig.get_path("purelib")]
    (hook / "sitecustomize.py").write_text(f"import sys\nsys.path += {paths!r}\n")
    return {
        "HOME": str(home),
        "IPYTHONDIR": str(home / "ipython"),
        "PATH": f"{bin_directory}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(hook),
        "TAILSPAN_STATE_DIR": str(home / "jobs"),
        "TZ": "Europe/Berlin",
    }


@pytest.fixture(scope="module")
def cells(bin_directory, environment):
    """Return what a front end received from each cell, by its source."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(), re.MULTILINE | re.DOTALL)
    pandas = [block for block in blocks if "import pandas" in block]
    assert len(pandas) == 1
    more = [*pandas, "lines.columns.to_list(), jobs.dtypes['created_at'].name", *FAILS.values()]
    done = subprocess.run(
        [bin_directory / "python", ROOT / "tests" / "orchestrators" / "notebook_kernel.py", "docs/notebook.ipynb"],
        input=json.dumps([*more, INTERRUPTED, AFTER, AWAITED]),
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return {cell["source"]: cell["received"] for cell in json.loads(done.stdout)}


def of_cell(cells, start: str) -> list[dict[str, Any]]:
    """Return what the cell that begins so sent, without the echo of its input."""
    (found,) = [received for source, received in cells.items() if source.startswith(start)]
    return [message for message in found if message["type"] != "execute_input"]


def html_of(message) -> str:
    """Return the HTML that a message displays."""
    return message["data"]["text/html"]


def traceback_of(cells, start: str) -> str:
    """Return the traceback that a cell sent, without colours."""
    (error,) = [message for message in of_cell(cells, start) if message["type"] == "error"]
    return ANSI.sub("", "\n".join(error["traceback"]))


def test_a_job_is_a_card(cells):
    """What `job_submit` returns is displayed as HTML, with a text for front ends without it."""
    result = of_cell(cells, "from tailspan import job_get_logs")[-1]
    assert result["type"] == "execute_result"
    assert "<strong>three-lines</strong>" in html_of(result)
    assert result["data"]["text/plain"].startswith("RunResponse(")


def test_a_tail_is_live(cells):
    """One card is displayed and then updated, up to the final state; the lines are printed below it."""
    sent = of_cell(cells, "job_tail_logs")
    cards = [message for message in sent if message["type"] in ("display_data", "update_display_data")]
    assert [message["type"] for message in cards][:2] == ["display_data", "update_display_data"]
    assert len({message["transient"]["display_id"] for message in cards}) == 1
    assert "RUNNING" in html_of(cards[0])
    assert "SUCCEEDED" in html_of(cards[-1])
    printed = "".join(message["text"] for message in sent if message["type"] == "stream")
    assert printed == "line 1\nline 2\nline 3\n"


def test_a_wait_is_live_and_leaves_a_line(cells):
    """The live card becomes one line, and the result is the card."""
    *live, result = of_cell(cells, "job_wait_for_job(job_submit(")
    assert [message["type"] for message in live][:2] == ["display_data", "update_display_data"]
    assert "RUNNING" in html_of(live[0])
    assert "exit code" not in html_of(live[-1])
    assert "FAILED" in html_of(live[-1])
    assert result["type"] == "execute_result"
    assert ">exit code</span>" in html_of(result)


def test_awaitable_methods_are_live(cells):
    """They run in the kernel's own event loop."""
    live = of_cell(cells, "async with")
    assert [message["type"] for message in live][:2] == ["display_data", "update_display_data"]


def test_a_list_is_a_table_with_local_times(cells):
    """The two jobs, newest first, with the time zone of the kernel."""
    (result,) = of_cell(cells, "job_list(10)")
    assert re.findall(r"fails|three-lines", html_of(result)) == ["fails", "three-lines"]
    assert " CET<" in html_of(result)


def test_lines_and_jobs_become_data_frames(cells):
    """With columns of the types that pandas has for them."""
    (result,) = of_cell(cells, "import pandas\n\npandas.DataFrame(")
    assert "line 3" in result["data"]["text/plain"]
    (result,) = of_cell(cells, "lines.columns")
    assert re.fullmatch(
        r"\(\['time', 'stream', 'severity', 'text'\], 'datetime64\[\w+, UTC\]'\)", result["data"]["text/plain"]
    )


@pytest.mark.parametrize("name", FAILS)
def test_an_error_shows_the_cell_only(cells, name):
    """IPython shows the line of the cell and the message, no file of Tailspan."""
    shown = traceback_of(cells, FAILS[name])
    assert "Cell In[" in shown
    assert "File " not in shown
    assert "tailspan" not in shown.replace("from tailspan import", "")
    assert "direct cause" not in shown


def test_interrupting_a_wait_shows_the_cell_only_and_leaves_the_job(cells):
    """The stop button ends the wait."""
    shown = traceback_of(cells, INTERRUPTED)
    assert "KeyboardInterrupt" in shown
    assert "File " not in shown
    (printed,) = of_cell(cells, AFTER)
    assert printed["text"] == "RUNNING\n"


def test_ipython_in_a_terminal_shows_no_card(bin_directory, environment):
    """It has no kernel: a wait prints its result only, and an error ends at the user's line."""
    code = (
        "from tailspan import *; print(job_wait_for_job(job_submit('echo hi')).job_name); job_get_status('no-such-job')"
    )
    done = subprocess.run(
        [bin_directory / "ipython", "--colors=NoColor", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("echo\n")
    shown = ANSI.sub("", done.stdout + done.stderr)
    assert "there is no local job 'no-such-job'" in shown
    assert str(ROOT) not in shown
    assert "File " not in shown


def test_the_environment_is_not_that_of_the_tests(bin_directory):
    """Tailspan itself needs no notebook package: its own environment has none."""
    assert Path(sys.prefix) / "bin" != bin_directory
    code = "import importlib.util; print(importlib.util.find_spec('IPython'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"

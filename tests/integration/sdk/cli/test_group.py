"""The command group: help, errors as one line with the right exit code, completion, and lazy imports."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from tailspan.cli import exit_codes, group, main
from tailspan.cli.options import _job_items
from tailspan.errors import (
    AuthError,
    ConfigError,
    CursorExpiredError,
    JobNotFoundError,
    ProtocolError,
    RequestRejectedError,
    ServiceUnavailableError,
    WaitTimeoutError,
)
from tailspan.models import ListedJob

CONTRACT = [
    "run",
    "jobs",
    "top",
    "logs",
    "tail",
    "tasks",
    "status",
    "open",
    "retry",
    "cancel",
    "wait",
    "exec-time",
    "serve",
    "agent",
    "doctor",
    "demo",
]
OURS = [*(name for name in CONTRACT if name not in ("agent", "doctor", "demo")), "completion"]


def tailspan(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from tailspan.cli import main; main(prog_name='tailspan')", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


def test_help_names_every_command_without_loading_one():
    """The list of commands costs the import of click, and nothing that a command needs."""
    code = (
        "import sys\nfrom tailspan.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'httpx', 'pydantic', 'rich', 'msgspec', 'anyio', 'asyncio', 'tailspan_agent', 'tailspan.client'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    listed = re.findall(r"^  ([a-z][a-z-]+)  ", done.stdout, re.MULTILINE)
    assert listed[: len(CONTRACT)] == CONTRACT
    assert done.stdout.endswith("[]\n")


def test_ctrl_c_while_it_starts():
    """It exits with 130 and without a traceback, also before the commands are imported."""
    program = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'click':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from tailspan.cli.start import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program, "jobs"], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


@pytest.mark.parametrize("name", OURS)
def test_each_command_has_help_with_an_example(name):
    """The help of a command has an example; the list of commands has its summary."""
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0
    assert re.search(rf"Examples?:\n +(?:\w+=\$\()?tailspan {name}\b", result.output)
    command = group.main.get_command(click.Context(main), name)
    assert command is not None
    assert group._COMMANDS[name].help.split()[0] == command.get_short_help_str().split()[0]


def test_version():
    """`--version` prints the version of the distribution."""
    assert re.fullmatch(
        r"tailspan \d+\.\d+\.\d+\n", CliRunner().invoke(main, ["--version"], prog_name="tailspan").output
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (AuthError("x"), 2),
        (ServiceUnavailableError("x"), 3),
        (ProtocolError("x"), 3),
        (RequestRejectedError("x"), 3),
        (JobNotFoundError("x"), 4),
        (WaitTimeoutError("x"), 124),
        (CursorExpiredError("x"), 1),
    ],
)
def test_each_error_has_its_exit_code(error, code):
    """Scripts can distinguish failures by the code alone."""
    assert exit_codes.exit_code_of(error) == code


def test_an_error_may_bring_its_own_exit_code():
    """Other packages, such as the agent, set theirs on the class."""

    class AgentSays(ConfigError):
        exit_code = 3

    assert exit_codes.exit_code_of(AgentSays("x")) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["status", "j", "--config", "/nowhere/config.toml"], "/nowhere/config.toml"),
        (["--config", "/nowhere/config.toml", "status", "j"], "/nowhere/config.toml"),
        (["status", "j", "--service", "nope"], "no service named 'nope'"),
        (["status", ""], "is not a job id"),
        (["status"], "Missing argument"),
        (["statsu", "j"], "No such command 'statsu'. Did you mean 'status'?"),
        (["jobs", "prnue"], "No such command 'prnue'. Did you mean 'prune'?"),
        (["agent", "relaod"], "No such command 'relaod'. Did you mean 'reload'"),
        (["logs", "j", "--grpe", "x"], "Did you mean '--grep'?"),
        (["logs", "j", "--grep", "("], "'(' is not a regular expression"),
        (["logs", "j", "--since", "soon"], "'soon' is neither an age such as 10m"),
        (["logs", "j", "--since", "1h", "--since-ms", "1"], "--since and --since-ms exclude each other"),
        (["logs", "j", "-1"], "-1 and JOB ('j') exclude each other"),
        (["tail", "j", "-n", "1", "--sample"], "--sample and -n exclude each other"),
        (["wait", "j", "--timeout", "soon"], "expected a duration"),
        (["wait", "j", "--timeout", "-1"], "'-1' is too short"),
        (["jobs", "--watch", "--json"], "--watch, --quiet and --json exclude each other"),
        (["jobs", "-q", "--json"], "--watch, --quiet and --json exclude each other"),
        (["jobs", "--attr", "team"], "'team' is not KEY=VALUE"),
        (["run"], "there is no command to run"),
        (["run", "--attr", "team", "--", "true"], "'team' is not KEY=VALUE"),
        (["run", "--json", "--", "true"], "--json needs --detach"),
        (["run", "--nmae", "x", "true"], "No such option"),
        (["jobs", "--limit", "0"], "0 is not in the range"),
        (["jobs", "prune", "--older-than", "soon"], "soon"),
        (["wait", "j", "--poll", "0"], "'0' is too short"),
    ],
)
def test_wrong_usage_is_one_message_and_exit_code_2(arguments, words, monkeypatch, tmp_path):
    """Nothing is started, and there is no traceback."""
    monkeypatch.setenv("TAILSPAN_STATE_DIR", str(tmp_path))
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stdout == ""
    assert isinstance(result.exception, SystemExit)


def test_an_error_message_is_one_clean_line(capsys):
    """What a server wrote into an error can neither add lines nor act on the terminal."""
    exit_codes.report(ServiceUnavailableError("it says:\n \x1b[2Jtailspan: all is well"))
    assert capsys.readouterr().err == "tailspan: it says: tailspan: all is well\n"


def test_a_missing_extra_is_named():
    """Without the agent's packages its commands print what to install, and the others work."""
    code = (
        "import sys\nsys.modules['tailspan_agent.cli'] = None\n"
        "from tailspan.cli import main\nmain(['agent', 'run'], prog_name='tailspan')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("tailspan: 'tailspan agent' cannot run")
    assert done.stderr.endswith("pip install 'tailspan[agent]'\n")


@pytest.mark.parametrize(
    ("module", "command", "extra"),
    [("google.protobuf", "agent", "agent"), ("starlette.routing", "agent", "agent"), ("yaml", "jobs", "kubernetes")],
)
def test_a_missing_package_is_one_line_with_its_extra(monkeypatch, module, command, extra):
    """Wherever it is imported, also in the middle of a command; what no extra installs stays an error of ours."""
    missing = ModuleNotFoundError(f"No module named {module!r}", name=module)

    def fail(*_: object, **__: object) -> None:
        raise missing

    monkeypatch.setattr("tailspan_agent.cli.settings_for", fail)
    monkeypatch.setattr("tailspan.cli.jobs.with_client", fail)
    result = CliRunner().invoke(main, [command, "check"] if command == "agent" else [command])
    package = module.partition(".")[0]
    assert result.exit_code == 2
    assert result.stderr == (
        f"tailspan: 'tailspan {command}' needs {package}, which is not installed: pip install 'tailspan[{extra}]'\n"
    )
    missing.name = "unheard_of"
    assert CliRunner().invoke(main, ["jobs"]).exception is missing


def test_the_config_of_the_group_holds_for_the_command_only(tmp_path, monkeypatch):
    """`tailspan --config F COMMAND` is the same as the option at the command, and changes nothing after the command."""
    monkeypatch.delenv("TAILSPAN_CONFIG", raising=False)
    config = tmp_path / "config.toml"
    config.write_text('nonsense = "here"\n')
    result = CliRunner().invoke(main, ["--config", str(config), "status", "j"])
    assert result.exit_code == 2
    assert "nonsense" in result.stderr
    assert "TAILSPAN_CONFIG" not in os.environ


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell):
    """Each shell gets its script."""
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    assert f"_TAILSPAN_COMPLETE={shell}_complete" in result.output


def complete(words: str, number: int, **environment: str) -> list[str]:
    """Return what bash would be offered."""
    asked = {"_TAILSPAN_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(number)}
    done = tailspan(env={**os.environ, **asked, **environment})
    assert done.stderr == ""
    return [line.removeprefix("plain,") for line in done.stdout.splitlines() if line]


def test_completion_of_commands_options_and_services(tmp_path):
    """Names are completed from what there is; a broken configuration is silence."""
    config = tmp_path / "config.toml"
    config.write_text('[services.fused-eu]\ntype = "fused"\nbase_url = "http://127.0.0.1:9"\n')
    assert complete("tailspan st", 1) == ["status"]
    assert "--timeout" in complete("tailspan wait --t", 2)
    assert complete("tailspan status --service fu", 3, TAILSPAN_CONFIG=str(config)) == ["fused-eu"]
    assert complete("tailspan status --service fu", 3, TAILSPAN_CONFIG="/nowhere") == []
    assert complete("tailspan status x", 2, TAILSPAN_CONFIG="/nowhere") == []
    assert complete("tailspan agent ver", 2) == ["verify"]
    assert complete("tailspan run -- ./sc", 3) == ["file,./sc"]


def test_completion_of_jobs():
    """Ids that begin like this, newest first, then names, which stand for their newest run."""
    rows = [ListedJob(job_id=f"e-{number}", job_name=name) for number, name in enumerate(["etl", "etl", "x", "e\x1b"])]
    for begun, texts in (("e", ["e-0", "e-1", "e-2", "e-3", "etl"]), ("et", ["etl"]), ("e-3", ["e-3"])):
        items = _job_items(rows, begun)
        assert [item.value for item in items] == texts
        assert all("\x1b" not in (item.help or "") for item in items)
    assert _job_items(rows, "et")[0].help == "newest run: e-0"

"""`tailspan serve` as a user types it."""

import subprocess
import sys

import pytest
from click.testing import CliRunner

from tailspan.cli import main


@pytest.fixture
def runner(tmp_path):
    """Type commands with a state directory of their own."""
    return CliRunner(env={"TAILSPAN_STATE_DIR": str(tmp_path), "TAILSPAN_CONFIG": "", "TAILSPAN_SERVE_TOKEN": None})


def test_public_address_without_a_token_is_refused(runner):
    """Jobs are not shown to the network by accident: exit code 2 and what to do."""
    result = runner.invoke(main, ["serve", "--host", "0.0.0.0"])
    assert result.exit_code == 2
    assert "0.0.0.0 is not a loopback address" in result.stderr
    assert "--token-file" in result.stderr


@pytest.mark.parametrize("content", [b"", b" \n", b"two words", b"two\nlines", b"\xff\xfe", b"nul\0"])
def test_token_file_without_a_token_is_refused(runner, tmp_path, content):
    """What cannot be a token is told without showing it."""
    path = tmp_path / "token"
    path.write_bytes(content)
    result = runner.invoke(main, ["serve", "--token-file", str(path)])
    assert result.exit_code == 2
    assert str(path) in result.stderr.replace("\n", "")
    assert "two" not in result.stderr


def test_missing_token_file_is_told(runner, tmp_path):
    """A token file that is not there stops the server before it serves everybody."""
    result = runner.invoke(main, ["serve", "--token-file", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert "No such file" in result.stderr


def test_empty_token_variable_is_refused(runner):
    """A variable that was meant to hold the token and is empty does not open the server to everybody."""
    result = runner.invoke(main, ["serve"], env={"TAILSPAN_SERVE_TOKEN": ""})
    assert result.exit_code == 2
    assert "TAILSPAN_SERVE_TOKEN does not hold a token" in result.stderr


def test_unknown_service_is_told(runner):
    """A service that is not configured is named, with those that are."""
    result = runner.invoke(main, ["serve", "--service", "nope"])
    assert result.exit_code == 2
    assert "'nope'" in result.stderr


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_missing_package_says_what_to_install(package):
    """In the light installation the command tells which extra it needs."""
    program = f"import sys; sys.modules[{package!r}] = None; from tailspan.cli import main; main(['serve'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{package}, which is not installed: pip install 'tailspan[serve]'" in done.stderr


def test_help_names_the_token_variable_and_an_example(runner):
    """The help says how to give the token, and shows a whole command."""
    text = runner.invoke(main, ["serve", "--help"]).output
    assert "TAILSPAN_SERVE_TOKEN" in text
    assert "tailspan serve --host" in text

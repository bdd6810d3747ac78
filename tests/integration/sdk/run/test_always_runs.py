"""Section 1: the job runs, with its own exit code and output, whatever is wrong with Tailspan."""

from __future__ import annotations

import grp
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tailspan
from tailspan._config_file import MAX_CONFIG_BYTES
from tests.fakes.local_jobs import until
from tests.fakes.variants import Variants

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become other users")
COMMAND = ["sh", "-c", "echo out; echo err >&2; exit 7"]
NOT_CAPTURED = re.compile(rb"tailspan: the command runs, but is not captured: .+\n")


@pytest.mark.parametrize(
    "config",
    [
        'this is not toml = = "',
        '[services.local]\nstate_dirr = "x"\n',
        "[services.local]\nstate_dir = 3\n",
        '[services.local]\ngroup = "no-such-group-here"\n',
        "[services.local]\nstate_dir = ''\n",
        "\xff",
    ],
)
def test_a_mistake_in_the_configuration(variants: Variants, tmp_path: Path, config: str) -> None:
    """One line says what is not captured and why; --strict refuses."""
    path = tmp_path / "config.toml"
    path.write_bytes(config.encode("latin-1"))
    env = {**variants.env, "TAILSPAN_CONFIG": str(path)}
    env.pop("TAILSPAN_STATE_DIR")
    done = variants.run("tailspan", COMMAND, env=env)
    assert (done.returncode, done.stdout) == (7, b"out\n")
    said, _, rest = done.stderr.partition(b"\n")
    assert NOT_CAPTURED.fullmatch(said + b"\n")
    assert rest == b"err\n"
    strict = variants.run("tailspan", COMMAND, "--strict", env=env)
    assert (strict.returncode, strict.stdout) == (2, b"")


@pytest.mark.parametrize(
    "config", ["[agent]\nno_such_key = 1\n", "[[agent.watch]]\nservice = 'x'\n", "[otlp]\ntimeout = -1\n"]
)
def test_what_concerns_the_agent_does_not_concern_a_job(variants: Variants, tmp_path: Path, config: str) -> None:
    """`run` reads only what it needs: the job is captured."""
    path = tmp_path / "config.toml"
    path.write_text(config)
    done = variants.run("tailspan", COMMAND, "--config", str(path))
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")
    assert len(variants.jobs()) == 1
    assert variants.run("tailspan", COMMAND, "--config", str(path), "--strict").returncode == 2


@pytest.mark.parametrize("kind", ["/dev/full", "/dev/zero", "directory", "large file", "binary"])
def test_a_configuration_that_is_not_a_file(variants: Variants, tmp_path: Path, kind: str) -> None:
    """A device without end is not read for ever; the job runs, and one line says why it is not captured."""
    path = tmp_path / "config"
    if kind == "large file":
        path.write_text("#" * (MAX_CONFIG_BYTES + 1))
    elif kind == "binary":
        path.write_bytes(os.urandom(100) + b"\xff")
    elif kind == "directory":
        path.mkdir()
    env = {**variants.env, "TAILSPAN_CONFIG": kind if kind.startswith("/") else str(path)}
    done = variants.run("tailspan", COMMAND, env=env)
    assert (done.returncode, done.stdout) == (7, b"out\n")
    assert NOT_CAPTURED.fullmatch(done.stderr.removesuffix(b"err\n"))


def test_a_configuration_from_a_pipe(variants: Variants) -> None:
    """`<(...)` of a shell is read to its end, and a named pipe waits for its writer, but not for ever."""
    (variants.directory / "config").write_text(f'[services.local]\nstate_dir = "{variants.directory}/x"\n')
    (variants.directory / "slow").write_text("sleep 0.3; cat config")
    script = (
        "unset TAILSPAN_STATE_DIR; mkfifo pipe; (sh slow > pipe) & TAILSPAN_CONFIG=pipe tailspan_run -- echo one\n"
        "TAILSPAN_CONFIG=<(sh slow) tailspan_run -- echo two; TAILSPAN_CONFIG=pipe tailspan_run -- echo three"
    )
    done = variants.shell(script)
    assert done.stdout == b"one\ntwo\nthree\n"
    assert NOT_CAPTURED.fullmatch(done.stderr)
    assert b"sends nothing within 5 s" in done.stderr
    assert len(list((variants.directory / "x" / "jobs").glob("2*"))) == 2


@pytest.mark.parametrize("where", ["/proc/x", "/dev/null", "/dev/full/x", "file/x"])
def test_a_state_directory_that_cannot_be_used(variants: Variants, tmp_path: Path, where: str) -> None:
    """Missing, read-only, in the place of a file: the job runs, and so it does with a timeout and detached."""
    (tmp_path / "file").touch()
    env = {**variants.env, "TAILSPAN_STATE_DIR": where}
    done = variants.run("tailspan", COMMAND, env=env)
    assert (done.returncode, done.stdout) == (7, b"out\n")
    assert NOT_CAPTURED.match(done.stderr)
    assert variants.run("tailspan", ["sleep", "60"], "--timeout", "0.3", env=env).returncode == 124
    detached = variants.run("tailspan", ["sh", "-c", "touch made"], "--detach", env=env)
    assert (detached.returncode, detached.stdout) == (0, b"")
    until((tmp_path / "made").exists)
    assert variants.run("tailspan", COMMAND, "--strict", env=env).returncode == 125


@pytest.mark.parametrize("limit", ["-n 12", "-n 16", "-f 0", "-f 1", "-u 1"])
def test_tiny_limits(variants: Variants, limit: str) -> None:
    """The job runs under `ulimit` as it would without us."""
    done = variants.shell(f"ulimit {limit}; tailspan_run -- sh -c 'echo out; exit 7'")
    assert (done.returncode, done.stdout) == (7, b"out\n"), done.stderr


def test_no_home(variants: Variants) -> None:
    """HOME unset, or not writable."""
    env = {key: value for key, value in variants.env.items() if not key.startswith(("HOME", "XDG_", "TAILSPAN_"))}
    for home in ({}, {"HOME": "/proc/nowhere"}):
        given = {**env, **home, "TAILSPAN_STATE_DIR": "~/x" if home else "/proc/x"}
        done = variants.run("tailspan", COMMAND, env=given)
        assert (done.returncode, done.stdout) == (7, b"out\n"), done.stderr


def tmpfs(directory: Path, size: str) -> bool:
    """Mount a small disk; return whether that is possible here."""
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(directory)], capture_output=True
    )
    return mounted.returncode == 0


@ROOT_ONLY
def test_a_disk_that_becomes_full(variants: Variants, tmp_path: Path) -> None:
    """The job is neither blocked nor ended, its output arrives, and the log has a gap with its size."""
    disk = tmp_path / "disk"
    if not tmpfs(disk, "256k"):
        pytest.skip("cannot mount")
    try:
        env = {**variants.env, "TAILSPAN_STATE_DIR": str(disk / "state")}
        done = variants.run("tailspan", ["sh", "-c", "seq 100000; exit 7"], env=env)
        assert done.returncode == 7
        assert done.stdout.split() == [str(number).encode() for number in range(1, 100_001)]
        assert re.search(rb"the output of job \S+ is incomplete, \d+ B are not captured: No space left", done.stderr)
        (job,) = (disk / "state" / "jobs").glob("2*")
        state = until(lambda: (found := json.loads((job / "state.json").read_text()))["finished_at"] and found)
        assert (state["exit_code"], state["lines"]) == (7, 100_000)
        assert state["lost_bytes"] > 0
        timed_out = variants.run(
            "tailspan", ["sh", "-c", "yes"], "--timeout", "1", env=env, stdout=subprocess.DEVNULL, capture_output=False
        )
        assert timed_out.returncode == 124
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


@ROOT_ONLY
def test_capture_goes_on_when_there_is_room(variants: Variants, tmp_path: Path) -> None:
    """Room is made in mid-job: what is printed then is in the log, behind the gap."""
    disk = tmp_path / "disk"
    if not tmpfs(disk, "1m"):
        pytest.skip("cannot mount")
    try:
        env = {**variants.env, "TAILSPAN_STATE_DIR": str(disk / "state")}
        # more than the supervisor and the pipe hold, so that some of it is lost before there is room
        script = f"seq 1000000; rm {disk}/ballast; sleep 3; echo after"
        (disk / "ballast").write_bytes(b"x" * 800_000)
        done = variants.run("tailspan", ["sh", "-c", script], env=env)
        assert done.returncode == 0
        (job,) = (disk / "state" / "jobs").glob("2*")
        assert (job / "log").read_bytes().endswith(b"\0after\n")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


Others = tuple[Path, Callable[..., subprocess.CompletedProcess[bytes]]]


@pytest.fixture
def others() -> Iterator[Others]:
    """Yield a state directory for all users, and what runs `tailspan run` as one of them."""
    python = next((path for path in ("/usr/bin/python3", sys.executable) if _is_new_enough(path)), None)
    if os.geteuid() != 0 or not shutil.which("setpriv") or python is None:
        pytest.skip("needs root, setpriv and an interpreter that other users can read")
    # Not below pytest's own directory, which each session of pytest closes to other users.
    directory = Path(tempfile.mkdtemp(prefix="tailspan-users-"))
    packages = directory / "packages"
    shutil.copytree(Path(tailspan.__file__).parent, packages / "tailspan", ignore=shutil.ignore_patterns("__pycache__"))
    (directory / "shared").mkdir()
    os.chmod(directory, 0o755)
    os.chmod(directory / "shared", 0o777)

    def run(uid: int, groups: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[bytes]:
        become = ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--inh-caps=-all", "--bounding-set=-all"]
        become += ["--groups", groups] if groups else ["--clear-groups"]
        settings = {"PATH": "/usr/bin:/bin", "HOME": "/", "PYTHONPATH": str(packages), **env}
        program = "from tailspan.cli.start import main; main()"
        command = [*become, python, "-c", program, *arguments] if arguments[0] == "run" else [*become, *arguments]
        return subprocess.run(command, env=settings, cwd="/", capture_output=True, timeout=60, check=False)

    yield directory / "shared" / "state", run
    shutil.rmtree(directory)


def _is_new_enough(path: str) -> bool:
    program = "import sys; assert sys.version_info >= (3, 11)"
    check = ["setpriv", "--reuid", "54321", "--bounding-set=-all", path, "-c", program]
    return os.path.exists(path) and subprocess.run(check, capture_output=True, check=False).returncode == 0


def test_a_user_without_a_name(others: Others) -> None:
    """Containers run under such numbers: the job is captured where the state directory is named, and runs where not."""
    state_dir, for_others = others
    done = for_others(54321, "", "run", "--", *COMMAND, TAILSPAN_STATE_DIR=str(state_dir))
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")
    assert len(list(state_dir.glob("jobs/2*"))) == 1
    done = for_others(54321, "", "run", "--", *COMMAND)
    assert (done.returncode, done.stdout) == (7, b"out\n")
    assert NOT_CAPTURED.match(done.stderr)


def test_two_users_share_a_state_directory(others: Others) -> None:
    """With `services.local.group`, both run jobs, and neither can remove the other's."""
    state_dir, for_others = others
    env = {"TAILSPAN_STATE_DIR": str(state_dir), "TAILSPAN_SERVICES__LOCAL__GROUP": "users"}
    gid = str(grp.getgrnam("users").gr_gid)
    for uid in (54321, 54322):
        done = for_others(uid, gid, "run", "--", *COMMAND, **env)
        assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")
    jobs = sorted(state_dir.glob("jobs/2*"))
    assert [job.stat().st_uid for job in jobs] == [54321, 54322]
    assert for_others(54322, gid, "cat", str(jobs[0] / "log")).stdout in (b"out\nerr\n", b"err\nout\n")
    assert for_others(54322, gid, "mv", str(jobs[0]), f"{jobs[0]}x").returncode != 0


def test_the_memory_settings_of_the_supervisor_stay_its_own(variants: Variants) -> None:
    """What glibc is told for the supervisor is not in the job's environment."""
    program = "import os; print(sorted(key for key in os.environ if 'MALLOC' in key))"
    assert variants.run("tailspan", [sys.executable, "-c", program]).stdout == b"[]\n"

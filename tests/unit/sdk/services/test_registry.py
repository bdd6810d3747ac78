"""Making services: by configured name, of installed classes, and with defaults for all that a service may leave out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import anyio
import pytest

from tailspan import job_get_status
from tailspan.config import Options, load_settings
from tailspan.errors import ConfigError, JobNotFoundError, RequestRejectedError
from tailspan.logs.page import MAX_PAGE_BYTES, MAX_PAGE_LINES, Line, numbered_pages
from tailspan.models import JobState, ListedJob
from tailspan.services import ChangeFeedService, JobService, MergingService, SubmitService
from tailspan.services.fused import FusedService
from tailspan.services.local import LocalService
from tailspan.services.registry import PluginError, check_service_type, open_service
from tailspan.testing import FakeService


class Minimal(JobService):
    """The least that a service has to be."""

    def __init__(self, name: str, *, lines: int = 3, state: str = "SUCCEEDED") -> None:
        self.name, self.identity = name, "minimal"
        self._lines = [Line(1_000_000 * (1 + number // 2), f"line {number}") for number in range(lines)]
        self._state = state

    async def get_job(self, job_id):
        if job_id != "j":
            raise JobNotFoundError(f"there is no job {job_id!r}")
        return self.make_status(job_id, self._state)

    async def read_logs(self, job_id, cursor=None, *, since_ms=None, late_window_s=10.0):
        await self.get_job(job_id)
        for page in self.make_pages(job_id, self._lines, cursor, since_ms=since_ms):
            yield page

    async def list_jobs(self):
        yield [ListedJob(job_id="j")]


class Protocolled:
    """A service as the documentation of 0.1 described it: the methods without the base class."""

    name, identity, poll_min_s, poll_max_s, final_read = "old", "old", 1.0, 30.0, False

    @classmethod
    def from_options(cls, name: str, options: Mapping[str, Any], settings: object) -> Protocolled:
        return cls()

    async def get_job(self, job_id: str) -> None:
        raise AssertionError("not reached")


async def collected(items):
    return [item async for item in items]


def test_a_minimal_service_has_all_methods():
    """Messages, times, cancelling and closing have defaults that follow from the three methods."""
    service = Minimal("m")

    async def work():
        return (
            await collected(service.read_messages("j", 2)),
            await service.log_times_ms("j"),
            (await service.cancel("j")).state,
            await service.aclose(),
        )

    messages, times, state, _ = anyio.run(work)
    assert messages == [[{"message": "line 2", "timestamp": 2}]]
    assert (times, state) == ((1, 2), JobState.SUCCEEDED)
    assert anyio.run(Minimal("m", lines=0).log_times_ms, "j") is None
    with pytest.raises(RequestRejectedError, match="the service 'm' cannot cancel jobs"):
        anyio.run(Minimal("m", state="RUNNING").cancel, "j")


def test_the_section_of_a_service_is_the_arguments_of_its_constructor():
    """Without a `from_options` of its own, keys are keyword arguments; a wrong key is named."""
    service = Minimal.from_options("m", {"type": "x", "lines": 1}, load_settings())
    assert (service.name, len(service._lines)) == ("m", 1)
    with pytest.raises(ConfigError, match=r"services\.m\.line: there is no such key; known here: lines, st") as caught:
        Minimal.from_options("m", {"line": 1}, load_settings())
    assert caught.value.key == "services.m.line"

    class Needs(Minimal):
        def __init__(self, name: str, folder: str) -> None:
            super().__init__(name)

    with pytest.raises(ConfigError, match=r"services\.m\.folder: is missing"):
        Needs.from_options("m", {}, load_settings())


def test_open_service_loads_the_configuration_by_itself(monkeypatch, tmp_path):
    """The settings may be left out, as everywhere else."""
    monkeypatch.setenv("TAILSPAN_STATE_DIR", str(tmp_path))
    assert open_service("local").name == "local"
    with pytest.raises(ConfigError, match="no service named 'nope' is configured"):
        open_service("nope")


def test_a_class_of_the_old_protocol_is_named_with_the_cure():
    """A plugin that only has the methods gets one error, as a class and as an object."""
    cure = r"test_registry\.Protocolled is not a job service: subclass tailspan\.services\.JobService"
    with pytest.raises(ConfigError, match=cure):
        check_service_type(Protocolled, "services.x.type is 'x'")
    with pytest.raises(ConfigError, match=cure):
        job_get_status("j", service=Protocolled())  # type: ignore[arg-type]


def test_an_incomplete_class_is_named_with_what_it_lacks():
    """Abstract methods are listed instead of a TypeError at the first use."""

    class Half(JobService):
        async def get_job(self, job_id):
            raise AssertionError("not reached")

    with pytest.raises(ConfigError, match=r"Half is incomplete: implement list_jobs, read_logs"):
        check_service_type(Half, "x")
    with pytest.raises(ConfigError, match="is not a class"):
        check_service_type(open_service, "x")


def test_installed_classes_are_found_and_broken_ones_named(monkeypatch, tmp_path):
    """The entry points of a package on the path: a good class opens, each other one is an error with its cause."""
    package = tmp_path / "plugin-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1\n")
    here = "tests.unit.sdk.services.test_registry"
    entries = {"good": f"{here}:Minimal", "old": f"{here}:Protocolled", "gone": "no_such_module:Service"}
    lines = "".join(f"{name} = {value}\n" for name, value in entries.items())
    (package / "entry_points.txt").write_text(f"[tailspan.services]\n{lines}")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = tmp_path / "config.toml"
    config.write_text("".join(f'[services.{name}]\ntype = "{name}"\n' for name in (*entries, "none")))
    settings = load_settings(config)
    assert type(open_service("good", settings)).__name__ == "Minimal"
    with pytest.raises(ConfigError, match=r"services\.old\.type is .old.: .*Protocolled is not a job") as caught:
        open_service("old", settings)
    assert caught.value.key == "services.old.type"
    with pytest.raises(ConfigError, match="no_such_module:Service cannot be loaded"):
        open_service("gone", settings)
    with pytest.raises(ConfigError, match=r"no such service type is installed; there is: .*good"):
        open_service("none", settings)


BROKEN = """
import os
from tests.unit.sdk.services.test_registry import Minimal
if os.environ.get("FAULT") == "import":
    raise RuntimeError("no licence")
class Acme(Minimal):
    def __init__(self, name, *, folder, level=1):
        super().__init__(name)
        if os.environ.get("FAULT") == "constructor":
            {}["secret"]
"""


@pytest.mark.parametrize(
    ("fault", "section", "text"),
    [
        (
            "import",
            "folder = 'x'",
            r"3: services\.acme: the plugin {p} cannot be loaded: RuntimeError: no licence \({f}:5\)",
        ),
        ("constructor", "folder = 'x'", r"3: services\.acme: the plugin {p} failed: KeyError: 'secret' \({f}:10\)"),
        ("", "", r"2: services\.acme\.folder: is missing \(plugin {p}\)"),
        ("", "folder = 'x'\nlevl = 1", r"5: services\.acme\.levl: there is no such key; known here: .* \(plugin {p}\)"),
    ],
)
def test_a_broken_plugin_is_named_with_its_file_and_line(monkeypatch, tmp_path, fault, section, text):
    """One line: where it is configured, which plugin it is, and where its own code failed."""
    name = f"acme_{fault}_{len(section)}"
    package = tmp_path / f"{name}-1.2.dist-info"
    package.mkdir()
    (package / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (package / "entry_points.txt").write_text(f"[tailspan.services]\nacme = {name}:Acme\n")
    (tmp_path / f"{name}.py").write_text(BROKEN)
    (tmp_path / "c.toml").write_text(f"\n[services.acme]\ntype = 'acme'\n{section}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("FAULT", fault)
    with pytest.raises(PluginError) as caught:
        open_service("acme", load_settings(tmp_path / "c.toml"))
    plugin, file = f"{name} 1\\.2, {name}:Acme", f"{tmp_path}/{name}\\.py"
    assert re.fullmatch(f"{tmp_path}/c.toml:" + text.format(p=plugin, f=file), str(caught.value)), str(caught.value)


def test_asking_what_a_service_can_do_touches_no_file(tmp_path):
    """`isinstance` reads no property, so it creates no state directory."""
    local = LocalService(state_dir=tmp_path / "state")
    kinds = (JobService, SubmitService, MergingService, ChangeFeedService)
    assert [isinstance(local, kind) for kind in kinds] == [True, True, False, True]
    assert not (tmp_path / "state").exists()
    fused, fake = FusedService(base_url="http://127.0.0.1:1/v1"), FakeService()
    assert [isinstance(fused, kind) for kind in kinds] == [True, False, True, False]
    assert [isinstance(fake, kind) for kind in kinds] == [True, True, False, False]


def test_capabilities_of_the_built_in_services():
    """What the agent and the job API go by, one by one."""
    kinds = (LocalService, FusedService)
    assert [(kind.polls_are_free, kind.has_offsets, kind.final_read) for kind in kinds] == [
        (True, True, False),
        (False, False, True),
    ]


def test_numbered_pages_are_the_same_from_every_cursor():
    """Each page's cursor yields the rest with the same times and uids; limits hold."""
    lines = [Line(1_000_000 * (number // 7_000), "x" * 100, "stdout") for number in range(12_000)]
    lines += [Line(5_000_000, b"y" * (MAX_PAGE_BYTES // 2 + 1))] * 3
    pages = list(numbered_pages(lines, None, identity="i", job_id="j"))
    assert [page.line_count for page in pages] == [5000, 5000, 2001, 1, 1]
    assert all(page.line_count <= MAX_PAGE_LINES for page in pages)
    rows = [row for page in pages for row in zip(page.uids(), page.times_unix_nano(), page.lines, strict=True)]
    assert len({uid for uid, _, _ in rows}) == len({nano for _, nano, _ in rows}) == len(lines)
    for page in pages:
        rest = numbered_pages(lines, page.cursor, identity="i", job_id="j")
        found = [row for one in rest for row in zip(one.uids(), one.times_unix_nano(), one.lines, strict=True)]
        assert found == rows[int(page.cursor) :]
    since = numbered_pages(lines, None, identity="i", job_id="j", since_ms=1)
    assert [uid for page in since for uid in page.uids()] == [uid for uid, _, _ in rows[7000:]]
    with pytest.raises(ConfigError, match="is not a cursor of this service"):
        list(numbered_pages(lines, b"@x", identity="i", job_id="j"))


def test_the_model_of_a_section_is_the_second_argument_of_the_constructor():
    """With `Options`, errors name the key; one that the constructor raises has its key below the section."""

    class Keys(Options):
        lines: int = 3

    class Modelled(Minimal):
        Options = Keys

        def __init__(self, name: str, options: Keys) -> None:
            if not options.lines:
                raise ConfigError("has no lines", key="lines")
            super().__init__(name, lines=options.lines)

    assert len(Modelled.from_options("m", {"type": "x", "lines": 5}, load_settings())._lines) == 5
    for wrong in ({"lines": 0}, {"lines": "many"}):
        with pytest.raises(ConfigError, match=r"services\.m\.lines: ") as caught:
            Modelled.from_options("m", wrong, load_settings())
        assert caught.value.key == "services.m.lines"


def test_a_submitted_job_has_a_status_whatever_the_service_answers():
    """A caller that gets an error would submit the job again."""

    class Submits(SubmitService, Minimal):
        async def submit(self, command, **options):
            return await self.status_after_submit(command[0], job_name="etl")

    submits = Submits("m")
    assert anyio.run(submits.submit, ["j"]).state is JobState.SUCCEEDED
    status = anyio.run(submits.submit, ["new"])
    assert (status.job_id, status.state, status.job_name) == ("new", JobState.PENDING, "etl")

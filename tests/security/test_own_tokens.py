"""Other users of the machine read no logs over loopback: page and job API have a token without being configured."""

from __future__ import annotations

import asyncio
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tailspan import _own_token
from tailspan._own_token import own_token, read_own_token
from tailspan.config import AgentSettings
from tailspan.errors import ConfigError
from tailspan.services.fused import FusedService
from tailspan_agent.web.session import Session
from tests.e2e.conftest import Machine
from tests.fakes.agents import Bench, looped
from tests.fakes.collector import Collector
from tests.fakes.scripted_service import ScriptedJob, ScriptedService, serving


@pytest.fixture
def bench(tmp_path: Path) -> object:
    """An agent with a fake service."""
    with Collector() as collector:
        yield Bench(tmp_path, collector)


def test_a_token_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    """With any umask the file is 0600 and its directory 0700; the next start finds the same token."""
    path = tmp_path / "state" / "token"
    before = os.umask(0)
    try:
        token = own_token(path, instead="x")
    finally:
        os.umask(before)
    assert len(token) >= 32
    assert own_token(path, instead="x") == token
    assert [stat.S_IMODE(each.stat().st_mode) for each in (path, path.parent)] == [0o600, 0o700]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.chmod(0o640),
        lambda path: path.write_text(""),
        lambda path: path.write_bytes(b"a\x00b"),
        lambda path: (path.rename(path.with_name("other")), path.symlink_to("other")),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_a_token_file_that_is_not_private_is_refused(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    """Open to others, empty, not text, a link, a directory: an error that names the file and the key."""
    path = tmp_path / "token"
    own_token(path, instead="agent.token_file")
    spoil(path)
    with pytest.raises(ConfigError, match=r"token.*agent\.token_file"):
        own_token(path, instead="agent.token_file")
    assert read_own_token(path, 1) is None


@looped
async def test_the_page_needs_the_token_of_its_link(bench: Bench) -> None:
    """Logs are behind the token; the link opens a session and leaves the address bar without it. Numbers are open."""
    async with bench.running(listen="127.0.0.1:0", needs_page_token=True) as agent:
        assert agent.server is not None
        async with httpx.AsyncClient(base_url=agent.server.url, trust_env=False, verify=False) as client:
            for path in ("/", "/job?service=fake&id=x", "/events/jobs", "/events/job", "/agent", "/pipelines"):
                assert (await client.get(path)).status_code == 401
            assert (await client.post("/cancel")).status_code == 401
            assert [(await client.get(path)).status_code for path in ("/metrics", "/healthz", "/readyz")] == [200] * 3
            assert (await client.get("/delivery?identity=x&job_id=y")).status_code == 200
            assert (await client.get("/?token=wrong")).status_code == 401
            entered = await client.get(f"{agent.server.link}&q=a%26b")
            assert (entered.status_code, entered.headers["location"]) == (303, "/?q=a%26b")
            assert (await client.get("/")).status_code == 200
            file = bench.settings().agent.page_token_file
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
            assert agent.server.link.endswith(f"?token={file.read_text().strip()}")


@looped
async def test_a_configured_token_is_required_for_numbers_too_and_is_not_in_the_link(bench: Bench) -> None:
    """Who configures a token may listen beyond loopback: metrics and deliveries need it, and no log has it."""
    async with bench.running(listen="127.0.0.1:0", token="s3cret-token", needs_page_token=True) as agent:
        assert agent.server is not None
        assert "s3cret" not in agent.server.link
        async with httpx.AsyncClient(base_url=agent.server.url, trust_env=False, verify=False) as client:
            assert [(await client.get(path)).status_code for path in ("/metrics", "/delivery", "/")] == [401] * 3
            assert (await client.get("/metrics", headers={"authorization": "Bearer s3cret-token"})).status_code == 200
    assert not bench.settings().agent.page_token_file.exists()


@looped
async def test_a_unix_socket_is_for_its_owner(bench: Bench, tmp_path: Path) -> None:
    """Its mode is the access control, also in place of the socket of a killed agent; a second agent finds it in use."""
    path = tmp_path / "s"
    for _ in range(2):
        async with bench.running(listen=f"unix:{path}", needs_page_token=True):
            assert stat.S_IMODE(path.lstat().st_mode) == 0o600
            transport = httpx.AsyncHTTPTransport(uds=str(path))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                assert [(await client.get(each)).status_code for each in ("/", "/metrics", "/healthz")] == [200] * 3
        assert not path.exists()
    path.write_text("a file of somebody")
    with pytest.raises(ConfigError, match=r"agent\.listen"):
        async with bench.running(listen=f"unix:{path}"):
            pass
    assert path.read_text() == "a file of somebody"


@looped
async def test_a_reload_ends_sessions_of_the_old_token(bench: Bench, tmp_path: Path) -> None:
    """New content of the token file, and new names, apply at once; who knew the old token has to log in again."""
    file = tmp_path / "token"
    file.write_text("old-token")
    keys = {"listen": "127.0.0.1:0", "token_file": str(file)}
    async with bench.running(**keys) as agent:
        assert agent.server is not None
        async with httpx.AsyncClient(base_url=agent.server.url, trust_env=False, verify=False) as client:
            await client.get("/?token=old-token")
            events = await client.send(client.build_request("GET", "/events/jobs"), stream=True)
            await agent.reload(bench.settings(**keys, allowed_hosts=["new.test"]))
            assert (await client.get("/")).status_code == 200
            file.write_text("new-token")
            await agent.reload(bench.settings(**keys, allowed_hosts=["new.test"]))
            async for _ in events.aiter_raw():
                pass  # the live updates of the old session end
            assert (await client.get("/")).status_code == 401
            assert (await client.get("/?token=old-token")).status_code == 401
            new = {"authorization": "Bearer new-token"}
            assert (await client.get("/metrics", headers=new)).status_code == 200
            assert (await client.get("/", headers={**new, "host": "new.test"})).status_code == 200
            assert (await client.get("/events/jobs?q=", headers={**new, "host": "gone.test"})).status_code == 421


@looped
async def test_a_token_file_that_cannot_be_read_changes_nothing(bench: Bench, tmp_path: Path) -> None:
    """A reload with a missing token file is refused as a whole."""
    file = tmp_path / "token"
    file.write_text("old-token")
    keys = {"listen": "127.0.0.1:0", "token_file": str(file)}
    async with bench.running(**keys) as agent:
        file.unlink()
        with pytest.raises(ConfigError, match="token_file"):
            await agent.reload(bench.settings(**keys))
        assert agent.server is not None
        async with httpx.AsyncClient(base_url=agent.server.url, trust_env=False, verify=False) as client:
            assert (await client.get("/metrics", headers={"authorization": "Bearer old-token"})).status_code == 200


@looped
async def test_cookies_behind_tls_are_secure(bench: Bench) -> None:
    """A proxy's URL makes cookies Secure, and its host is accepted."""
    keys = {"listen": "127.0.0.1:0", "token": "s3cret-token"}
    async with bench.running(**keys, public_url="https://tailspan.test") as agent:
        assert agent.server is not None
        assert agent.server.link == "https://tailspan.test"
        async with httpx.AsyncClient(base_url=agent.server.url, trust_env=False, verify=False) as client:
            host = {"host": "tailspan.test"}
            link = await client.get("/?token=s3cret-token", headers=host)
            form = await client.post("/login", data={"token": "s3cret-token"}, headers=host)
            assert ["Secure" in each.headers["set-cookie"] for each in (link, form)] == [True, True]
            await agent.reload(bench.settings(**keys))
            assert "Secure" not in (await client.get("/?token=s3cret-token")).headers["set-cookie"]


def test_forms_through_a_proxy_that_renames_the_host() -> None:
    """The origin of the public URL is ours, whatever Host the proxy sends."""
    session = Session("t", public_url="https://tailspan.test")
    headers = {"host": "127.0.0.1:8797", "origin": "https://tailspan.test"}
    assert session.sent_by_us(headers, session.form_token)
    assert not session.sent_by_us({**headers, "origin": "https://evil.test"}, session.form_token)
    assert not Session("t").sent_by_us({"origin": "null"}, session.form_token)


@pytest.mark.parametrize(
    "wrong",
    [
        "tailspan.test",
        "ftp://x",
        "https://x/pa th",
        "https://x/#a",
        "https://x/?q=1",
        "https://u:p@x",
        "https://[",
        "https://",
    ],
)
def test_public_urls_that_are_none(wrong: str) -> None:
    """The error names the key."""
    with pytest.raises(ValueError, match='expected "https://HOST"'):
        AgentSettings(public_url=wrong)


def test_serve_makes_a_token_and_its_user_needs_no_step(machine: Machine) -> None:
    """Without a token 401; a Tailspan of the same user finds it; `--no-token` requires none."""
    job_id = machine.tailspan("run", "--detach", "--", "echo", "hi").stdout.strip()
    machine.tailspan("wait", job_id)
    server = machine.start("serve", "--port", "0")
    assert server.stderr is not None
    url = server.stderr.readline().split()[-1]
    path = Path(server.stderr.readline().split()[-1])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert httpx.get(f"{url}/job/self").status_code == 401
    token = path.read_text().strip()
    assert httpx.get(f"{url}/job/self", headers={"authorization": f"Bearer {token}"}).status_code == 200
    machine.configure(f'[services.served]\ntype = "fused"\nbase_url = "{url}"\n')
    assert machine.tailspan("logs", job_id, "--service", "served").stdout == "hi\n"
    open_server = machine.start("serve", "--port", "0", "--no-token")
    assert open_server.stderr is not None
    assert httpx.get(f"{open_server.stderr.readline().split()[-1]}/job/self").status_code == 200


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="only Linux says who listens on a port")
def test_the_own_token_is_not_sent_to_another_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A server of another user on loopback gets no token, nor does a port that several users listen on."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    token = own_token(tmp_path / "tailspan" / "serve-token", instead="x")
    service = ScriptedService({"j": ScriptedJob(lines=["a"])})
    found: list[object] = []

    async def use(port: int) -> None:
        fused = FusedService("far", base_url=f"http://127.0.0.1:{port}/server/v1", tries=1)
        try:
            found.append((await fused.get_job("j")).job_id)
        except Exception as error:
            found.append(str(error))
        finally:
            await fused.aclose()

    with serving(service, token=token) as server:
        asyncio.run(use(server.port))
        monkeypatch.setattr(_own_token, "listening_users", lambda port: {os.geteuid(), os.geteuid() + 1})
        asyncio.run(use(server.port))
    assert found[0] == "j"
    assert re.search("401.*none was sent", str(found[1]))

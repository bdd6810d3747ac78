"""Where the Fused service's credentials come from, how a login is renewed, and that no token is ever shown."""

import asyncio
import json
import stat
from datetime import UTC, datetime, timedelta

import pytest

from tailspan.errors import AuthError, ServiceUnavailableError
from tailspan.services.fused import FusedService
from tailspan.services.fused.auth import Credentials
from tests.fakes.job_api import FakeJobApi, status_fault

HOSTED = "https://www.fused.io/server/v1"
SECRET = "s3cr3t-token"
ENV = {"FUSED_AUTH_TOKEN": SECRET, "FUSED_AUTH_TOKEN_TYPE": "Fused-Service-Token"}


@pytest.fixture
def api():
    """A server that accepts any credentials unless a test limits them."""
    with FakeJobApi() as fake:
        fake.add_job("j")
        yield fake


@pytest.fixture
def login(tmp_path):
    """Write a login as the official client does; returns how to write it and where it is."""
    path = tmp_path / "credentials"

    def write(access_token=SECRET, *, expires_in_s=3600, **more):
        expires_at = (datetime.now(UTC) + timedelta(seconds=expires_in_s)).isoformat()
        fields = {"access_token": access_token, "auth_scheme": "Bearer", "refresh_token": "r-1", "scope": "openid"}
        path.write_text(json.dumps({**fields, "expires_at": expires_at, **more}))
        return path

    return write


def value(credentials):
    """Return the header that would be sent."""
    return asyncio.run(credentials.authorization()).value


def get_job(api, credentials, **options):
    """Ask for the job's status with these credentials."""

    async def main():
        service = FusedService("fused", base_url=api.base_url, credentials=credentials, tries=1, **options)
        try:
            return await service.get_job("j")
        finally:
            await service.aclose()

    return asyncio.run(main())


def sent(api):
    """Return the Authorization headers that reached the server's job API."""
    return [request.headers.get("Authorization") for request in api.requests if request.verb != "oauth"]


def test_own_options_come_first(tmp_path, login):
    """The section's token beats the environment, the environment beats the login."""
    file = tmp_path / "token"
    file.write_text(" from-file \n")
    logged_in = login("from-login")
    assert value(Credentials("f", HOSTED, token="t", environ=ENV, login_file=logged_in)) == "Fused-Env-Bearer t"
    found = value(Credentials("f", HOSTED, token_file=file, scheme="Bearer", environ=ENV, login_file=logged_in))
    assert found == "Bearer from-file"
    assert value(Credentials("f", HOSTED, environ=ENV, login_file=logged_in)) == f"Fused-Service-Token {SECRET}"
    assert value(Credentials("f", HOSTED, environ={}, login_file=logged_in)) == "Bearer from-login"


def test_sources_are_read_at_each_request(tmp_path):
    """A rotated file and a changed environment count from the next request on."""
    file = tmp_path / "token"
    file.write_text("one")
    environ = dict(ENV)
    from_file, from_environ = Credentials("f", HOSTED, token_file=file), Credentials("f", HOSTED, environ=environ)
    assert (value(from_file), value(from_environ)) == ("Fused-Env-Bearer one", f"Fused-Service-Token {SECRET}")
    file.write_text("two")
    environ["FUSED_AUTH_TOKEN"] = "other"
    assert (value(from_file), value(from_environ)) == ("Fused-Env-Bearer two", "Fused-Service-Token other")


def test_without_credentials_it_says_what_to_set(tmp_path):
    """No browser, no waiting: an error at once that names every way."""
    with pytest.raises(AuthError) as caught:
        value(Credentials("prod", HOSTED, environ={}, login_file=tmp_path / "none"))
    assert all(way in str(caught.value) for way in ("services.prod.token_file", "FUSED_AUTH_TOKEN", "fused client"))
    assert caught.value.service == "prod"


def test_a_token_of_unknown_type_is_explained(tmp_path):
    """A token whose type is missing is not used, and the error says why without showing it."""
    environ = {"FUSED_AUTH_TOKEN": SECRET}
    with pytest.raises(AuthError, match="FUSED_AUTH_TOKEN_TYPE is ''") as caught:
        value(Credentials("f", HOSTED, environ=environ, login_file=tmp_path / "none"))
    assert SECRET not in str(caught.value)


def test_loopback_needs_none(api):
    """A server on this machine is asked without any header."""
    get_job(api, Credentials("f", api.base_url, environ={}))
    assert sent(api) == [None]


@pytest.mark.parametrize(
    "base_url",
    [
        "https://jobs.example.com/server/v1",
        "https://www.fused.io.example.com/server/v1",
        "https://www.fused.io:8443/server/v1",
        "https://fused.io/server/v1",
        "http://www.fused.io/server/v1",
        "http://jobs.example.com/server/v1",
    ],
)
def test_environment_and_login_are_for_the_public_server_only(login, base_url):
    """Another host, another port, or plain HTTP gets neither; the error names the key to set."""
    with pytest.raises(AuthError, match=r"services\.f\.token_file .*are for another server") as caught:
        value(Credentials("f", base_url, environ=ENV, login_file=login()))
    assert SECRET not in str(caught.value)
    assert value(Credentials("f", base_url, token="own", environ=ENV)) == "Fused-Env-Bearer own"


def test_environment_and_login_are_not_sent_to_loopback(api, login):
    """Another user of the machine may listen there; a request without a header is enough for our own server."""
    get_job(api, Credentials("f", api.base_url, environ=ENV, login_file=login()))
    assert sent(api) == [None]


def test_a_login_may_name_its_server(login):
    """A login with a ``base_url`` is for that server and no other; plain HTTP gets none except on this machine."""
    private = "https://fused.example.com/server/v1"
    assert value(Credentials("f", private, environ={}, login_file=login(base_url=private))) == f"Bearer {SECRET}"
    for base_url, named in ((HOSTED, private), (HOSTED, 7), ("http://a.test", "http://a.test"), (private, "https://[")):
        with pytest.raises(AuthError):
            value(Credentials("f", base_url, environ={}, login_file=login(base_url=named)))


@pytest.mark.parametrize("content", [b"", b"\n", b"a\nb", b"\xff\xfe", "tökn".encode(), b"a\x00b"])
def test_a_file_that_holds_no_token(tmp_path, content):
    """What cannot be a token is refused before it breaks a header."""
    file = tmp_path / "token"
    file.write_bytes(content)
    with pytest.raises(AuthError, match="token"):
        value(Credentials("f", HOSTED, token_file=file))


def test_a_missing_token_file_is_named(tmp_path):
    """The error names the key and the path."""
    with pytest.raises(AuthError, match=r"^services\.f\.token_file: cannot read .*nowhere"):
        value(Credentials("f", HOSTED, token_file=tmp_path / "nowhere"))


def test_an_expired_login_is_renewed_before_the_request(api, login):
    """The request already has the new token, and so has the file, which only its owner can read."""
    path = login("old", expires_in_s=-1, base_url=api.base_url)
    api.oauth_reply = {"access_token": "new", "expires_in": 3600, "refresh_token": "r-2"}
    api.authorizations = {"Bearer new"}
    get_job(api, Credentials("f", api.base_url, environ={}, login_file=path, oauth_url=api.oauth_url))
    assert sent(api) == ["Bearer new"]
    [asked] = api.asked("oauth")
    body = json.loads(asked.body)
    assert (body["grant_type"], body["refresh_token"], bool(body["client_id"])) == ("refresh_token", "r-1", True)
    saved = json.loads(path.read_text())
    assert (saved["access_token"], saved["refresh_token"], saved["scope"]) == ("new", "r-2", "openid")
    assert datetime.fromisoformat(saved["expires_at"]) > datetime.now(UTC) + timedelta(minutes=50)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["credentials"]


def test_a_refused_login_is_renewed_once(api, login):
    """On 401 the login is renewed, the refresh token kept if none came, and the request repeated."""
    path = login("revoked", base_url=api.base_url)
    api.authorizations = {"Bearer new-token"}
    get_job(api, Credentials("f", api.base_url, environ={}, login_file=path, oauth_url=api.oauth_url))
    assert sent(api) == ["Bearer revoked", "Bearer new-token"]
    assert json.loads(path.read_text())["refresh_token"] == "r-1"


def test_a_login_renewed_by_another_process_is_taken(api, login):
    """If the file changed meanwhile, its token is tried instead of renewing again."""
    path = login("old", base_url=api.base_url)
    credentials = Credentials("f", api.base_url, environ={}, login_file=path, oauth_url=api.oauth_url)
    api.authorizations = {"Bearer theirs"}
    refused = asyncio.run(credentials.authorization())
    login("theirs", base_url=api.base_url)
    assert asyncio.run(credentials.renew(refused)).value == "Bearer theirs"
    assert api.asked("oauth") == []


def test_a_refused_token_file_is_read_again(api, tmp_path):
    """A file that was rotated between two requests is read again on 401."""
    file = tmp_path / "token"
    file.write_text("new")
    api.authorizations = {"Fused-Env-Bearer new"}
    credentials = Credentials("f", api.base_url, token_file=file)
    refused = asyncio.run(Credentials("f", api.base_url, token="old").authorization())
    assert asyncio.run(credentials.renew(refused)).value == "Fused-Env-Bearer new"


def test_after_one_refresh_it_gives_up(api, login):
    """A server that refuses the renewed token too gets no third request."""
    path = login("old", base_url=api.base_url)
    api.authorizations = set()
    with pytest.raises(AuthError, match="credentials"):
        get_job(api, Credentials("f", api.base_url, environ={}, login_file=path, oauth_url=api.oauth_url))
    assert (len(sent(api)), len(api.asked("oauth"))) == (2, 1)


def test_a_fixed_token_is_not_repeated(api):
    """There is nothing to refresh in a fixed token: one request, then the error, which says where it came from."""
    api.authorizations = set()
    with pytest.raises(AuthError, match=r"401 .*Not authenticated.*services\.fused\.token") as caught:
        get_job(api, Credentials("fused", api.base_url, token=SECRET))
    assert len(api.requests) == 1
    assert SECRET not in str(caught.value)


def test_a_login_that_cannot_be_renewed(api, login):
    """A refused refresh token says to log in again; a token server that is down is a passing fault."""
    credentials = Credentials("f", HOSTED, environ={}, login_file=login(expires_in_s=-1), oauth_url=api.oauth_url)
    api.fault(status_fault(403, "invalid_grant r-1"), on="oauth")
    with pytest.raises(AuthError, match="log in again") as caught:
        value(credentials)
    assert "r-1" not in str(caught.value)
    api.fault(status_fault(503), on="oauth")
    with pytest.raises(ServiceUnavailableError):
        value(credentials)
    assert value(credentials) == "Bearer new-token"


@pytest.mark.parametrize("reply", [{}, {"access_token": 7, "expires_in": 1}, {"access_token": "x"}, []])
def test_a_token_reply_without_a_token(api, login, reply):
    """A reply of another shape is no token."""
    api.oauth_reply = reply
    credentials = Credentials("f", HOSTED, environ={}, login_file=login(expires_in_s=-1), oauth_url=api.oauth_url)
    with pytest.raises(AuthError, match="not renewed"):
        value(credentials)


def test_a_login_that_cannot_be_saved_is_kept_in_memory(api, login):
    """Where no file can be written beside it, the renewed login serves this process, and is not renewed each time."""
    path = login(expires_in_s=-1)
    # No name is left for a temporary file: this stops root, too.
    path = path.rename(path.with_name("c" * 250))
    credentials = Credentials("f", HOSTED, environ={}, login_file=path, oauth_url=api.oauth_url)
    assert [value(credentials), value(credentials)] == ["Bearer new-token"] * 2
    assert len(api.asked("oauth")) == 1
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_two_requests_renew_once(api, login):
    """Requests that find the login expired at one moment wait for one renewal: a second would void the first."""
    credentials = Credentials("f", HOSTED, environ={}, login_file=login(expires_in_s=-1), oauth_url=api.oauth_url)

    async def main():
        return await asyncio.gather(credentials.authorization(), credentials.authorization())

    assert [found.value for found in asyncio.run(main())] == ["Bearer new-token"] * 2
    assert len(api.asked("oauth")) == 1


def test_no_repr_shows_a_token(api, login):
    """Neither the objects nor what is in them print a token."""
    credentials = Credentials("f", HOSTED, token=SECRET)
    service = FusedService("f", base_url=HOSTED, token=SECRET)
    shown = repr([credentials, service, asyncio.run(credentials.authorization()), service._http])
    assert SECRET not in shown


def test_a_server_that_echoes_the_token(api):
    """An error text that repeats the token is shown without it."""
    api.fault(status_fault(400, f"what is {SECRET}?"))
    with pytest.raises(Exception, match=r"what is \*\*\*\?"):
        get_job(api, Credentials("f", api.base_url, token=SECRET))

"""`Cluster`: where the API server is and how to log in there, from a kubeconfig or a pod's service account.

Source: kubernetes.io, "Organizing Cluster Access Using kubeconfig Files", "Client authentication", and "Accessing the
Kubernetes API from a Pod".
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import ssl
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict, TypeVar
from urllib.parse import urlsplit

import anyio
import msgspec

from tailspan._net import default_tls, host_port, read_secret_file
from tailspan._times import time_of
from tailspan.errors import AuthError, ConfigError, ServiceUnavailableError
from tailspan.services._requests import Authorization, Authorizer, make_authorization, normalise_base_url

__all__ = ["Cluster", "ClusterCredentials", "find_cluster", "read_manifest"]

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_PLUGIN_S = 60.0
_PLUGIN_API = "client.authentication.k8s.io/v1"
_EARLY_S = 10.0
_MAX_ERROR_CHARS = 300
# An expired certificate of a plugin ends no connection that is open.
_NO_TOKEN = Authorization("", "nowhere")

T = TypeVar("T")


class Plugin(msgspec.Struct, rename="camel"):
    """The ``exec`` section of a kubeconfig's user: a command that prints credentials."""

    command: str
    api_version: str | None = None
    args: list[str] | None = None
    env: list[dict[str, str]] | None = None
    install_hint: str | None = None
    provide_cluster_info: bool | None = None


# What is used of a kubeconfig. As in Go's JSON, null stands for a key that is missing.
_ClusterKeys = TypedDict(
    "_ClusterKeys",
    {
        "server": str | None,
        "certificate-authority": str | None,
        "certificate-authority-data": str | None,
        "insecure-skip-tls-verify": bool | None,
        "tls-server-name": str | None,
        "proxy-url": str | None,
    },
    total=False,
)
_UserKeys = TypedDict(
    "_UserKeys",
    {
        "token": str | None,
        "tokenFile": str | None,
        "username": str | None,
        "password": str | None,
        "client-certificate": str | None,
        "client-certificate-data": str | None,
        "client-key": str | None,
        "client-key-data": str | None,
        "exec": Plugin | None,
        "as": str | None,
        "as-groups": Any,
        "as-uid": Any,
        "as-user-extra": Any,
        "auth-provider": Any,
    },
    total=False,
)


class _ContextKeys(TypedDict, total=False):
    cluster: str | None
    user: str | None
    namespace: str | None


class _Clusters(msgspec.Struct):
    name: str
    cluster: _ClusterKeys | None = None


class _Users(msgspec.Struct):
    name: str
    user: _UserKeys | None = None


class _Contexts(msgspec.Struct):
    name: str
    context: _ContextKeys | None = None


class _Kubeconfig(msgspec.Struct, rename="kebab"):
    clusters: list[_Clusters] | None = None
    users: list[_Users] | None = None
    contexts: list[_Contexts] | None = None
    current_context: str | None = None


class _Merged:
    """The entries of several kubeconfigs by name, each with its directory: the first one of a name counts."""

    def __init__(self) -> None:
        self.clusters: dict[str, tuple[_ClusterKeys, Path]] = {}
        self.users: dict[str, tuple[_UserKeys, Path]] = {}
        self.contexts: dict[str, tuple[_ContextKeys, Path]] = {}

    def add(self, found: _Kubeconfig, directory: Path) -> None:
        """Add a kubeconfig."""
        for cluster in found.clusters or ():
            self.clusters.setdefault(cluster.name, (cluster.cluster or {}, directory))
        for user in found.users or ():
            self.users.setdefault(user.name, (user.user or {}, directory))
        for context in found.contexts or ():
            self.contexts.setdefault(context.name, (context.context or {}, directory))


class _PluginStatus(msgspec.Struct, rename="camel"):
    token: str = ""
    client_certificate_data: str = ""
    client_key_data: str = ""
    expiration_timestamp: str | None = None


class _PluginReply(msgspec.Struct):
    status: _PluginStatus | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The API server, and what proves who asks.

    Attributes:
        server: URL of the API server.
        source: Where this comes from, for messages.
        namespace: The namespace of the context, or of the pod.
        ca: Certificates to trust, as PEM; None: those of the system.
        verifies: Whether the server's certificate is verified; False only where the kubeconfig says so.
        server_name: The name in the server's certificate; None: that of the URL.
        token: A fixed token.
        token_file: A file with a token, which may change at any time.
        basic: User and password, joined by a colon.
        certificate: The client's certificate and key, as PEM.
        plugin: Prints a token or a certificate.
        acts_as: The user to impersonate.
        directory: Relative commands of a plugin begin here.
    """

    server: str
    source: str
    namespace: str = "default"
    ca: str | None = None
    verifies: bool = True
    server_name: str | None = None
    token: str | None = field(default=None, repr=False)
    token_file: Path | None = None
    basic: str | None = field(default=None, repr=False)
    certificate: tuple[str, str] | None = field(default=None, repr=False)
    plugin: Plugin | None = field(default=None, repr=False)
    acts_as: str | None = None
    directory: Path = Path()


def find_cluster(
    kubeconfig: Path | None, context: str | None, *, environ: Mapping[str, str], account: Path = _ACCOUNT
) -> Cluster:
    """Return the cluster that a kubeconfig names, or the one that this pod runs in.

    Args:
        kubeconfig: The file; None: ``KUBECONFIG``, ``~/.kube/config``, then the pod's service account.
        context: The context in it; None: the current one.
        environ: The environment.
        account: Directory of the pod's service account.

    Raises:
        ConfigError: There is no such file, or it is not usable.
    """
    paths = [kubeconfig] if kubeconfig is not None else _usual_paths(environ)
    merged, current = _Merged(), context
    for path in paths:
        try:
            found = msgspec.convert(read_manifest(path, "kubeconfig"), _Kubeconfig)
        except msgspec.ValidationError as error:
            raise ConfigError(f"kubeconfig: {path}: {error}", key="kubeconfig") from None
        current = current or found.current_context or None
        merged.add(found, path.parent)
    if paths:
        return _cluster_of(merged, current, str(paths[0]))
    host = environ.get("KUBERNETES_SERVICE_HOST")
    if not host or not (account / "token").exists():
        raise ConfigError("there is no kubeconfig, and this is no pod with a service account: set kubeconfig")
    port = int(environ.get("KUBERNETES_SERVICE_PORT", "443"))
    return Cluster(
        server=f"https://{host_port(host, port)}",
        source=str(account),
        namespace=_text(account / "namespace").strip() or "default",
        ca=_text(account / "ca.crt"),
        token_file=account / "token",
    )


def read_manifest(path: Path, key: str) -> dict[str, Any]:
    """Return the mapping that a file of YAML or JSON has.

    Args:
        path: The file.
        key: The configuration key that names it, for errors.

    Raises:
        ConfigError: It cannot be read, or has something else; or YAML cannot be read without another package.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{key}: cannot read {path}: {reason}", key=key) from None
    found: Any = None
    try:
        found = json.loads(text)
    except ValueError:
        try:
            import yaml
        except ImportError:
            raise ConfigError(f"{key}: {path} is YAML, which needs: pip install 'tailspan[kubernetes]'") from None
        try:
            found = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: {path} is not YAML: {error}", key=key) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{key}: {path} has no mapping", key=key)
    return found


def _usual_paths(environ: Mapping[str, str]) -> list[Path]:
    if named := environ.get("KUBECONFIG"):
        paths = [_home(Path(one)) for one in named.split(os.pathsep) if one]
        # As kubectl does: files that are missing do not count, unless all are.
        return [path for path in paths if path.exists()] or paths
    usual = Path("~/.kube/config").expanduser()
    return [usual] if usual.exists() else []


def _cluster_of(merged: _Merged, context: str | None, source: str) -> Cluster:
    def entry(kind: str, name: str | None, known: Mapping[str, tuple[T, Path]]) -> tuple[T, Path]:
        if name is None or name not in known:
            shown = ", ".join(sorted(known)) or "none"
            raise ConfigError(f"kubeconfig: {source} has no {kind} {name!r}; there is: {shown}", key="kubeconfig")
        return known[name]

    chosen, _ = entry("context", context, merged.contexts)
    cluster, cluster_dir = entry("cluster", chosen.get("cluster"), merged.clusters)
    user, user_dir = entry("user", chosen["user"], merged.users) if chosen.get("user") else (_UserKeys(), Path())
    if cluster.get("proxy-url"):
        raise ConfigError(f"kubeconfig: {source} sets proxy-url, which is not supported: set HTTPS_PROXY instead")
    for key in ("auth-provider", "as-groups", "as-uid", "as-user-extra"):
        if user.get(key):
            raise ConfigError(f"kubeconfig: {source} sets {key}, which is not supported: use an exec plugin or a token")
    pair = _pem(user, "client-certificate", user_dir), _pem(user, "client-key", user_dir)
    token_file, name = user.get("tokenFile"), user.get("username")
    server = cluster.get("server") or "http://localhost:8080"
    try:
        server = normalise_base_url(server)
    except ConfigError:
        text = f"kubeconfig: {source}: the server {server[:200]!r} is not a URL such as https://HOST:6443"
        raise ConfigError(text, key="kubeconfig") from None
    return Cluster(
        server=server,
        source=source,
        namespace=chosen.get("namespace") or "default",
        ca=_pem(cluster, "certificate-authority", cluster_dir),
        verifies=not cluster.get("insecure-skip-tls-verify"),
        server_name=cluster.get("tls-server-name") or None,
        token=user.get("token") or None,
        token_file=user_dir / _home(Path(token_file)) if token_file else None,
        basic=f"{name}:{user.get('password') or ''}" if name else None,
        certificate=(pair[0], pair[1] or pair[0]) if pair[0] else None,
        plugin=user.get("exec"),
        acts_as=user.get("as") or None,
        directory=user_dir,
    )


def _pem(section: Mapping[str, Any], key: str, directory: Path) -> str | None:
    """Return a certificate or key of a section: inline, or from a file beside the kubeconfig."""
    if data := section.get(f"{key}-data"):
        try:
            return base64.b64decode(data).decode()
        except (binascii.Error, ValueError):
            raise ConfigError(f"kubeconfig: {key}-data is not base64 of PEM", key="kubeconfig") from None
    return _text(directory / _home(Path(section[key]))) if section.get(key) else None


def _home(path: Path) -> Path:
    """Return the path with the user's directory in place of ``~``, where there is such a user."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"kubeconfig: cannot read {path}: {error}", key="kubeconfig") from None


class ClusterCredentials(Authorizer):
    """The token of each request, and the TLS context of each connection.

    Attributes:
        version: Changes with the client's certificate: then new connections are needed.
    """

    def __init__(self, service: str, cluster: Cluster) -> None:
        """Read nothing yet.

        Args:
            service: Name of the configured service, for messages.
            cluster: Where the credentials are.
        """
        self.version = 0
        self._service = service
        self._cluster = cluster
        self._printed: _PluginStatus | None = None
        self._expires_s: float | None = None
        self._lock = anyio.Lock()

    async def authorization(self) -> Authorization:
        """Return the header of the next request.

        Raises:
            AuthError: The token cannot be read, or the plugin fails.
        """
        cluster = self._cluster
        if cluster.plugin is not None:
            return self._bearer((await self._from_plugin(cluster.plugin)).token, f"the plugin {cluster.plugin.command}")
        if cluster.token_file is not None:
            try:
                # A mounted token is replaced before it expires: read it each time.
                return self._bearer(read_secret_file(cluster.token_file, key="tokenFile"), str(cluster.token_file))
            except ConfigError as error:
                raise AuthError(str(error), service=self._service) from None
        if cluster.basic is not None:
            pair = base64.b64encode(cluster.basic.encode()).decode()
            return make_authorization("Basic", pair, cluster.source, service=self._service)
        return self._bearer(cluster.token or "", cluster.source)

    async def renew(self, refused: Authorization) -> Authorization | None:
        """Return a token that has changed since; a plugin prints another one. None without one."""
        async with self._lock:
            if self._printed is not None and self._printed.token == refused.value.removeprefix("Bearer "):
                self._printed = None
        current = await self.authorization()
        return current if current.value != refused.value else None

    async def prepare(self) -> None:
        """Make sure that a plugin's certificate is there before a connection needs it."""
        if self._cluster.plugin is not None:
            await self._from_plugin(self._cluster.plugin)

    def tls(self) -> ssl.SSLContext | None:
        """Return the TLS context; None for plain HTTP.

        Raises:
            ConfigError: A certificate is not usable.
        """
        cluster = self._cluster
        if urlsplit(cluster.server).scheme == "http":
            return None
        pair = cluster.certificate
        if self._printed is not None and self._printed.client_certificate_data:
            pair = self._printed.client_certificate_data, self._printed.client_key_data
        if cluster.ca is None and pair is None and cluster.verifies:
            return default_tls()
        try:
            context = ssl.create_default_context(cadata=cluster.ca)
            # Python 3.13 refuses certificates without an authority key id, which clusters of the field have.
            context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
            if not cluster.verifies:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            if pair is not None:
                with _private_file("\n".join(pair)) as path:
                    context.load_cert_chain(path, password="")
        except ssl.SSLError as error:
            raise ConfigError(f"kubeconfig: {cluster.source}: a certificate or key is not usable: {error}") from None
        return context

    def _bearer(self, token: str, source: str) -> Authorization:
        if not token:
            return _NO_TOKEN
        return make_authorization("Bearer", token, source, service=self._service)

    async def _from_plugin(self, plugin: Plugin) -> _PluginStatus:
        async with self._lock:
            expired = self._expires_s is not None and time.time() >= self._expires_s - _EARLY_S
            if self._printed is None or expired:
                before = self._printed
                self._printed = printed = await self._run(plugin)
                expires = time_of(printed.expiration_timestamp)
                self._expires_s = expires.timestamp() if expires is not None else None
                if before is not None and before.client_certificate_data != printed.client_certificate_data:
                    self.version += 1
            return self._printed

    async def _run(self, plugin: Plugin) -> _PluginStatus:
        """Run the plugin.

        Raises:
            AuthError: It cannot be run, fails, or prints something else.
            ServiceUnavailableError: It takes too long.
        """
        command = plugin.command
        if os.sep in command:
            command = str(self._cluster.directory / command)
        spec: dict[str, Any] = {"interactive": False}
        if plugin.provide_cluster_info:
            ca = self._cluster.ca and base64.b64encode(self._cluster.ca.encode()).decode()
            spec["cluster"] = {"server": self._cluster.server, "certificate-authority-data": ca}
        info = {"apiVersion": plugin.api_version or _PLUGIN_API, "kind": "ExecCredential", "spec": spec}
        own = {one.get("name", ""): one.get("value", "") for one in plugin.env or ()}
        env = {**os.environ, **own, "KUBERNETES_EXEC_INFO": json.dumps(info)}
        hint = f"; {plugin.install_hint}" if plugin.install_hint else ""
        shown = f"the plugin {plugin.command} of {self._cluster.source}"
        try:
            with anyio.fail_after(_PLUGIN_S):
                done = await anyio.run_process([command, *(plugin.args or ())], env=env, check=False)
        except OSError as error:
            raise AuthError(f"{shown} cannot be run: {error.strerror}{hint}", service=self._service) from None
        except TimeoutError:
            text = f"{shown} printed no credentials within {_PLUGIN_S:g} s"
            raise ServiceUnavailableError(text, service=self._service) from None
        if done.returncode:
            text = " ".join(done.stderr.decode("utf-8", "replace").split())[-_MAX_ERROR_CHARS:]
            raise AuthError(f"{shown} failed with exit code {done.returncode}: {text}{hint}", service=self._service)
        try:
            reply = msgspec.json.decode(done.stdout, type=_PluginReply)
        except (msgspec.DecodeError, UnicodeDecodeError):
            reply = _PluginReply()
        status = reply.status
        if status is None or not (status.token or status.client_certificate_data):
            raise AuthError(f"{shown} printed no credentials", service=self._service)
        expires = time_of(status.expiration_timestamp)
        if expires is not None and expires <= datetime.now(UTC):
            raise AuthError(f"{shown} printed credentials that have expired: {expires}", service=self._service)
        return status


@contextlib.contextmanager
def _private_file(text: str) -> Iterator[str]:
    """Yield the path of a file with a text that only this user can read: OpenSSL takes keys from files only."""
    handle, path = tempfile.mkstemp()
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        yield path
    finally:
        Path(path).unlink()

"""Hide secrets in what is stored and sent of a command: its arguments, the job's name and attributes. Pure.

A secret is found by the name before it (``--password x``, ``DB_PASS=x``), by the option of a known program
(``mysql -px``), by its place in a URL, or by its own form. A script within an argument (``sh -c "..."``) is divided
into words, and each of its commands is treated like the command itself.

`tailspan run` imports this before it starts the command: the patterns are compiled only where a text can match.
"""

from __future__ import annotations

from tailspan.local.job_name import default_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["default_name", "redact_attributes", "redact_command", "redact_name"]

_HIDDEN = "***"
# Each name of a secret and each form of a secret contains one of these, in lower case.
_HINTS = (
    "pass", "pw", "phrase", "secret", "token", "key", "cred", "auth", "cookie", "bearer", "session", "otp", "jwt",
    "psk", "sig", "identified", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "xox", "sk-", "akia",
    "asia", "aiza", "eyj", "ya29.", "npm_", "pypi-", "hf_", "jdbc:oracle",
)  # fmt: skip
# Options of programs that take a secret and whose names do not reveal that. A program also counts after a wrapper:
# `docker exec db mysql -px`.
_PROGRAMS = {
    **dict.fromkeys(("mysql", "mysqldump", "mysqladmin", "mysqlimport", "mysqlcheck", "mysqlpump", "mysqlslap"), "-p"),
    **dict.fromkeys(
        ("mariadb", "mariadb-dump", "mariadb-admin", "mariadb-import", "mariadb-check", "mysqlbinlog"), "-p"
    ),
    **dict.fromkeys(("mongo", "mongosh", "mongodump", "mongorestore", "mongoexport", "mongoimport"), "-p"),
    **dict.fromkeys(("ldapsearch", "ldapadd", "ldapmodify", "ldapdelete", "ldapwhoami"), "-w"),
    "ldappasswd": "-w -s -a",
    **dict.fromkeys(("sqlcmd", "bcp", "osql", "tsql", "isql"), "-P"),
    **dict.fromkeys(("docker", "podman", "helm", "oc", "buildah", "skopeo", "nerdctl", "crane", "cf", "az"), "-p"),
    **dict.fromkeys(("7z", "7za", "7zr", "7zz", "rar", "unrar"), "-p"),
    "sshpass": "-p",
    "twine": "-p",
    "curl": "-u -U -b --user --proxy-user",
    "wget": "--user",
    "http": "-a",
    "https": "-a",
    "xh": "-a",
    "redis-cli": "-a",
    "redis-benchmark": "-a",
    "valkey-cli": "-a",
    "openssl": "-k -K",
    "kubectl": "--from-literal",
    "smbclient": "-U",
    "winexe": "-U",
    "rpcclient": "-U",
    "lftp": "-u",
    "ncftp": "-p",
    "ncftpput": "-p",
    "ncftpget": "-p",
    "useradd": "-p",
    "usermod": "-p",
    "zip": "-P",
    "unzip": "-P",
    "impala-shell": "-l",
    "beeline": "-p",
    "snmpget": "-A -X -c",
    "snmpwalk": "-A -X -c",
    "ipmitool": "-P",
    "swaks": "-ap",
    "vncviewer": "-P",
    "ssh-keygen": "-N -P",
    "ab": "-A",
    "cqlsh": "-p",
    "hive": "-p",
    "rdesktop": "-p",
    "xfreerdp": "/p:",
    "wfreerdp": "/p:",
    "steghide": "-p",
    "open": "-u",
}
# Words, not options, that precede a secret.
_WORDS = {"pdftk": ("user_pw", "owner_pw"), "mysqladmin": ("password",), "mariadb-admin": ("password",)}
# Here `-p x` has another meaning than `-px`: a port, or a file.
_JOINED_ONLY = ("mysql", "mariadb", "7z", "rar", "unrar")
# Of these only `docker login -p x` and the like.
_LOGIN_ONLY = ("docker", "podman", "helm", "oc", "buildah", "skopeo", "nerdctl", "crane", "cf", "az")
# Programs that take a secret without an option, see `_places`.
_PLACES = ("htpasswd", "mosquitto_passwd", "rabbitmqctl", "openssl", "mkpasswd", "vault", "net", "smbclient", "secrets")
# What these read from a pipe is a secret: `echo x | docker login --password-stdin`.
_READERS = (
    "chpasswd",
    "--password-stdin",
    "--pass-stdin",
    "--with-token",
    "--token-stdin",
    "sudo -S",
    "passwd --stdin",
)
# Options with a user and a password, of any program but those for which `-u a:b` is a user and a group, or an update.
_USER_OPTIONS = ("-u", "-user", "--user", "--userpwd", "--username", "--login", "--proxy-user")
_GROUP_PROGRAMS = ("docker", "podman", "nerdctl", "buildah", "crictl", "rsync", "date")
# Programs whose argument `user:password@host` is a login.
_COLON_LOGINS = ("mysqlsh", "impacket-")
# Flags of curl that may precede an option in one argument: `-sSu me:secret`.
_CURL_FLAGS = "#0346aBfgGiIjJklLnNOpqRsSvZ"
# Programs whose argument `user/password@database` is a login.
_SLASH_LOGINS = ("sqlplus", "sqlldr", "expdp", "impdp", "exp", "imp", "rman", "sqlcl")
# After these words a name of its own precedes its value: `aws configure set aws_secret_access_key x`.
_SETTERS = ("set", "setenv", "config", "configure")
_MARKS = "\"'\\`$({})"
_AS_SPACES = str.maketrans(dict.fromkeys(f"{_MARKS};|&/", " "))
_TRAILING = ",;)]}"
_MAX_DEPTH = 4
_MAX_ROUNDS = 5
_patterns: _Patterns | None = None


class _Patterns:
    """The compiled patterns.

    An argument may be 128 KB long: whatever repeats is bounded, or the search would be quadratic in its length.

    Attributes:
        option: An option or variable with a secret, as a whole word.
        assignment: The beginning of a word up to a secret value: ``DB_PASS=``, ``-Dpassword=``.
        header: The beginning of a text up to a secret value: ``X-Api-Key: ``.
        value: A secret after its name, anywhere in a text.
        form: A secret by its own form.
        url: The user and the password of a URL.
        word: A word of a shell script.
        separator: What ends a command of a shell script.
    """

    def __init__(self) -> None:
        import re

        strong = (
            r"passw(?:or)?d|pass-?phrase|passcode|secret|(?<!max[_-])(?<!num[_-])(?<!new[_-])token(?!i[sz]|s?[_-](?:count|limit|size))"
            r"|(?:api|access|private|account|master|encryption|signing|storage|license|subscription|functions)[_-]?key"
            r"|credential|authorization|cookie|sess(?:ion)?[_-]?id"
        )
        # A file or a prompt is not a secret itself.
        where = r"(?![\w.-]{0,64}[_-](?:stdin|files?|path|fd|prompt)(?![\w-]))"
        weak = (
            "pw|pwd|upw|opw|pass|passin|passout|storepass|keypass|auth|authkey|bearer|otp|jwt|psk|sig|signature|creds?"
            "|auth[_-]?key|deploy[_-]?key"
        )
        # A weak name is a word of its own: not `compass`, but `DB_PASS` and `dbPass`.
        begins = r"(?:(?<![A-Za-z0-9])|(?<=[a-z])(?=(?-i:[A-Z])))"
        key = r"(?<=(?-i:[A-Z0-9])_)(?-i:KEY)"
        name = rf"(?:(?:{strong}){where}[\w.-]{{0,64}}+|{begins}(?:{weak}|{key})(?![\w-]))"
        whole = rf"[\w.:/-]{{0,64}}?{name}"
        quoted = r"""(?P<mark>\\{1,8}["']).*?(?:(?P=mark)|$)|"(?:\\.|[^"\\])*(?:"|$)|'(?:\\.|[^'\\])*(?:'|$)"""
        scheme = r"(?:(?:Bearer|Basic|Token|Digest|Negotiate|ApiKey)\s{1,8})?"
        self.option = re.compile(rf"--?{whole}", re.IGNORECASE)
        self.assignment = re.compile(rf"(?:[\w.-]{{1,64}}+=)?[\w.$:-]{{0,64}}?{name}\+?=(?!=)", re.IGNORECASE)
        self.header = re.compile(
            rf"(?:-H|--[\w-]{{1,20}}=)?[\w-]{{0,64}}?(?:{name}|(?<=-)key)\s{{0,8}}:(?!/)\s{{0,8}}", re.IGNORECASE
        )
        self.value = re.compile(
            rf"""(?P<name>(?:{name}["'\\\])}}]{{0,9}}\s{{0,8}}(?:=>|:=|[=:>])|(?:password|identified\s+by)\s+(?=["']))\s{{0,8}})"""
            rf"""(?!["'\\]{{0,9}}\*\*\*)(?:{quoted}|{_nested(3)}|["']?{scheme}[^\s"'&<]+)""",
            re.IGNORECASE | re.DOTALL,
        )
        self.yaml = re.compile(
            rf"""(?P<name>(?:^[ \t]{{0,64}}(?:-[ \t]+)?|[{{,][ \t]{{0,8}})["']?[\w.-]{{0,64}}?{name}["']?:[ \t]+)"""
            r"""(?!["']|\*\*\*)"""
            rf"""(?P<value>(?<=[^{{,])[|>][+-]?[ \t]*(?:\n[ \t]+[^\n]*)+|[^\s\[{{"',}}][^\n"',}}]*)""",
            re.IGNORECASE | re.MULTILINE,
        )
        self.form = re.compile(
            r"\b(?:gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abeprs]-[\w-]{10,}|sk-[\w-]{20,}"
            r"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{30,}|ya29\.[\w-]{20,}|npm_\w{30,}|pypi-[\w-]{20,}|hf_\w{30,}"
            r"|eyJ[\w-]{10,4096}+\.[\w-]{10,8192}+\.[\w-]*)|(?<=(?-i:B|b)earer )[^\s\"']+",
        )
        self.url = re.compile(
            r"""(?P<scheme>\b[a-z][a-z0-9+.-]{0,30}+://)"""
            r"""(?:[^\s/?\#@:"'<>]{0,256}+:(?!\d{1,5}[/?\#])(?:\\\s|[^\s"'<>]){0,300}|[^\s/?\#@:"'<>]{0,256})@""",
            re.IGNORECASE,
        )
        # A password with spaces, in a URL that is an argument or in quotes.
        self.spaced_url = re.compile(
            r"""(?P<scheme>(?:^|(?<=["'=]))[a-z][a-z0-9+.-]{0,30}+://)"""
            r"""[^\s/?\#@:"'<>]{0,256}+:(?!\d{1,5}(?:[/?\#\s]|$))[^"'<>/?\#\n]{0,300}@(?=[\w[])""",
            re.IGNORECASE,
        )
        self.oracle = re.compile(
            r"""(?P<scheme>\bjdbc:oracle:\w{1,16}:)[^\s/@"']{1,256}/[^\s"'<>]{1,300}@""", re.IGNORECASE
        )
        self.login = re.compile(
            r"""["']?(?P<user>[\w.@%+\\-]{1,128}):(?!\d+["']?$|[/.~])(?!(?P=user)["']?$).+""", re.DOTALL
        )
        self.connection = re.compile(r"""["']?[A-Za-z][\w .-]{0,64}=[^;]*(?:;[A-Za-z][\w .-]{0,64}=[^;]*)+;?["']?""")
        self.word = re.compile(r"""(?:[^\s'"\\;|&()<>]|\\.|'[^']*'|"(?:\\.|[^"\\])*")+""", re.DOTALL)
        self.separator = re.compile(r"[;|&\n(<>]")


def _nested(depth: int) -> str:
    """Return the pattern of a JSON list or object; one that is not closed goes on to the end."""
    inside = r"""[^\[\]{}"']|"(?:\\.|[^"\\])*(?:"|$)|'(?:\\.|[^'\\])*(?:'|$)"""
    within = f"|{_nested(depth - 1)}" if depth else "|[\\[{\\]}]"
    return rf"(?:[\[{{](?:{inside}{within})*+(?:[\]}}]|$))"


def redact_command(command: Sequence[str]) -> list[str]:
    """Return the command with its secrets hidden; as many arguments as before."""
    if not _may_have_secret(" ".join(command)):
        return list(command)
    found, shown = _compiled(), list(command)
    # What is hidden can show that more is a secret: again, until nothing changes.
    for _ in range(_MAX_ROUNDS):
        known, shown = shown, _redact_words(found, shown, 0)
        if shown == known:
            break
    return shown


def redact_name(text: str) -> str:
    """Return a text, such as a job's name, with its secrets hidden."""
    return redact_command([text])[0]


def redact_attributes(attributes: Mapping[str, str]) -> dict[str, str]:
    """Return a job's attributes with their secrets hidden: in a key, in a value, or by the key's name."""
    return {redact_name(key): _redact_attribute(key, value) for key, value in attributes.items()}


def _redact_attribute(key: str, value: str) -> str:
    if _may_have_secret(key) and value and _compiled().option.fullmatch(f"-{key}"):
        return _HIDDEN
    return redact_name(value)


def _compiled() -> _Patterns:
    global _patterns
    if _patterns is None:
        _patterns = _Patterns()
    return _patterns


def _may_have_secret(text: str) -> bool:
    lower = text.lower()
    if any(hint in lower for hint in _HINTS) or ("://" in text and "@" in text):
        return True
    if ":" in text and any(option in text for option in _USER_OPTIONS):
        return True
    return any(_is_known(word) for word in text.translate(_AS_SPACES).split())


def _is_known(program: str) -> bool:
    return any(program in known for known in (_PROGRAMS, _SLASH_LOGINS, _WORDS, _PLACES)) or (
        program.startswith(_COLON_LOGINS)
    )


def _redact_words(found: _Patterns, words: Sequence[str], depth: int) -> list[str]:
    """Return the words of one command with its secrets hidden.

    Args:
        found: The patterns.
        words: The command; in a script with their quotes.
        depth: How many scripts there are around it.
    """
    shown: list[str] = []
    program = before = ""
    sets = False
    bares = [word.strip(_MARKS) for word in words]
    places = _places(bares)
    for number, (word, bare) in enumerate(zip(words, bares, strict=True)):
        if number in places:
            kept = places[number]
            shown.append(word[:kept] + _hide(word[kept:]))
            before = ""
            continue
        if number and _hides_next(found, before, program, bare, sets=sets) and not bare.startswith("--"):
            shown.append(_hide(word))
            # The value of an option is not an option itself; what `sshpass` starts has options of its own.
            before, program = "", "" if program == "sshpass" else program
            continue
        shown.append(_redact_word(found, word, program, depth, is_script=_precedes_script(before)))
        base = bare.rpartition("/")[2]
        if _is_known(base) or base in _GROUP_PROGRAMS:
            program = base
        elif base == "login" and program in _LOGIN_ONLY:
            program = f"{program} login"
        sets = sets or bare in _SETTERS
        before = bare
    return shown


def _places(words: Sequence[str]) -> dict[int, int]:
    """Return which words of a command are secrets by their place, and how many characters of each are shown."""
    bases = [word.rpartition("/")[2] for word in words]
    at = next((number for number, base in enumerate(bases) if base in _PLACES), None)
    if at is None:
        return {}
    rest = [number for number in range(at + 1, len(words)) if not words[number].startswith("-")]
    options = [word for word in words[at + 1 :] if word.startswith("-")]
    values = {number: words[number].find("=") + 1 for number in rest[1:]}
    program, first = bases[at], words[rest[0]] if rest else ""
    hidden: list[int] = []
    match program:
        case "htpasswd" | "mosquitto_passwd" if any("b" in option.lstrip("-") for option in options):
            hidden = rest[-1:]
        case "rabbitmqctl" if first in ("add_user", "change_password", "authenticate_user"):
            hidden = rest[2:3]
        case "openssl" if first == "passwd":
            hidden = [number for number in rest[1:] if words[number - 1] not in ("-salt", "-in", "-rand")]
        case "mkpasswd":
            hidden = [number for number in rest if not words[number - 1].startswith("-")][:1]
            hidden = hidden or [number for number in rest if words[number - 1] in ("-s", "-5")]
        case "net" if first == "use":
            hidden = [number for number in rest[3:] if not words[number].startswith("/")][:1]
        case "smbclient" if first.startswith("//") and rest[1:2] == [rest[0] + 1]:
            hidden = rest[1:2]
        case "vault" if first == "login":
            hidden = [number for number, kept in values.items() if not kept]
        case "vault" | "secrets" if {"put", "patch", "set"} & set(words[at + 1 : at + 3]):
            return {number: kept for number, kept in values.items() if kept}
        case _:
            pass
    return dict.fromkeys(hidden, 0)


def _hides_next(found: _Patterns, word: str, program: str, following: str, *, sets: bool) -> bool:
    """Return whether the word after this one is a secret."""
    if word in _USER_OPTIONS and program not in _GROUP_PROGRAMS and found.login.fullmatch(following):
        return True
    if word.startswith("-"):
        return bool(found.option.fullmatch(word)) or _is_secret_option(word, program)
    if word.lower() == "convertto-securestring" or word in _WORDS.get(program, ()):
        return True
    return sets and bool(found.option.fullmatch(f"-{word}")) and not word.startswith("set")


def _is_secret_option(word: str, program: str) -> bool:
    if program.startswith(_JOINED_ONLY) or program in _LOGIN_ONLY:
        return False
    options = _PROGRAMS.get(program.removesuffix(" login"), "").split()
    if program == "curl" and not word.startswith("--"):
        return word[-1] in "uUb" and not word[1:-1].strip(_CURL_FLAGS)
    return word in options


def _precedes_script(word: str) -> bool:
    """Return whether the word after this one is a script: ``-c``, ``-lc``."""
    return word.startswith("-") and word.endswith("c") and not word.startswith("--")


def _redact_word(found: _Patterns, word: str, program: str, depth: int, *, is_script: bool = False) -> str:
    """Return a word with the secrets within it hidden."""
    if is_script and depth < _MAX_DEPTH:
        return _redact_text(found, _redact_script(found, word, depth + 1), depth)
    opening = word[: len(word) - len(word.lstrip("\"'"))]
    body = word[len(opening) :]
    match = found.assignment.match(body) if "=" in body else None
    match = match or (found.header.match(body) if ":" in body else None)
    if match is not None and match.end() < len(body):
        return opening + match[0] + _hide(body[match.end() :], closing=opening)
    joined = _joined_option(word, program) or _joined_login(found, word, program)
    if joined:
        return joined + _hide(word[len(joined) :])
    if ";" in word and found.connection.fullmatch(word):
        return _redact_text(found, _redact_connection(found, word), depth)
    if depth < _MAX_DEPTH and any(char.isspace() for char in word):
        word = _redact_script(found, word, depth + 1)
    return _redact_text(found, word, depth)


def _redact_text(found: _Patterns, word: str, depth: int) -> str:
    """Return a text without secrets that are recognised wherever they are."""
    if depth:
        # The whole script is searched at once.
        return word
    for url in (found.url, found.spaced_url, found.oracle):
        word = url.sub(rf"\g<scheme>{_HIDDEN}@", word)
    word = found.yaml.sub(rf"\g<name>{_HIDDEN}", word)
    word = found.value.sub(lambda match: match["name"] + _hide(match[0][len(match["name"]) :]), word)
    return found.form.sub(_HIDDEN, word)


def _joined_option(word: str, program: str) -> str:
    """Return the part of a word before the secret that a known program has in it; empty without one."""
    if program in _SLASH_LOGINS:
        user, slash, rest = word.partition("/")
        return user + slash if rest and slash and user and not user.startswith(("-", ".", "@", "/")) else ""
    if not word.startswith(("-", "/")) or program in _LOGIN_ONLY:
        return ""
    if program == "curl" and not word.startswith("--"):
        flags = word[1:].lstrip(_CURL_FLAGS)
        return word[: len(word) - len(flags) + 1] if flags[:1] in ("u", "U", "b") and len(flags) > 1 else ""
    for option in _PROGRAMS.get(program.removesuffix(" login"), "").split():
        if option.startswith("--") and word.startswith(f"{option}="):
            return f"{option}="
        if not option.startswith("--") and word.startswith(option) and len(word) > len(option):
            return option
    return ""


def _joined_login(found: _Patterns, word: str, program: str) -> str:
    """Return the part of a word before the user and password in it; empty without them."""
    option, equals, value = word.partition("=")
    if equals and option in _USER_OPTIONS and program not in _GROUP_PROGRAMS and found.login.fullmatch(value):
        return option + equals
    if program.startswith(_COLON_LOGINS) and "@" in word and "://" not in word and found.login.fullmatch(word):
        return word[: word.index(":") + 1]
    return ""


def _redact_connection(found: _Patterns, text: str) -> str:
    """Return a connection string, ``Server=x;Password=y``, with its secrets hidden."""
    parts = []
    for part in text.split(";"):
        key, equals, value = part.partition("=")
        hides = value and found.option.fullmatch(f"-{key.strip(_MARKS).replace(' ', '_')}")
        closing = value[-1:] if value[-1:] in ("'", '"') else ""
        parts.append(key + equals + _HIDDEN + closing if hides else part)
    return ";".join(parts)


def _redact_script(found: _Patterns, text: str, depth: int) -> str:
    """Return a text, which may be a shell script, with the secrets in its commands hidden."""
    parts: list[str] = []
    words: list[str] = []
    gaps: list[str] = []
    done = 0
    if text[:1] in ("'", '"') and text[-1:] == text[0] and len(text) > 1:
        return text[0] + _redact_script(found, text[1:-1], depth) + text[0]
    commands: list[tuple[list[str], list[str]]] = []
    for match in found.word.finditer(text):
        gap = text[done : match.start()]
        if words and found.separator.search(gap):
            commands.append((gaps, words))
            words, gaps = [], []
        words.append(match[0])
        gaps.append(gap)
        done = match.end()
    commands.append((gaps, words))
    nothing: tuple[list[str], list[str]] = ([], [])
    for number, (gaps, words) in enumerate(commands):
        earlier, later = commands[number - 1] if number else nothing, (*commands[number + 1 : number + 2], nothing)[0]
        if words[:1] in (["echo"], ["printf"]) and "|" in "".join(later[0][:1]) and _reads_secret(later[1]):
            shown = [words[0], *(word if word.startswith("-") else _hide(word) for word in words[1:])]
        elif "<<<" in "".join(gaps[:1]) and _reads_secret(earlier[1]):
            shown = [_hide(words[0]), *words[1:]]
        else:
            shown = _redact_words(found, words, depth)
        parts += _joined(gaps, shown)
    return "".join(parts) + text[done:]


def _reads_secret(words: Sequence[str]) -> bool:
    """Return whether a command takes a secret from its standard input."""
    return any(set(reader.split()) <= set(words) for reader in _READERS)


def _joined(gaps: Sequence[str], words: Sequence[str]) -> list[str]:
    return [part for pair in zip(gaps, words, strict=True) for part in pair]


def _hide(value: str, *, closing: str = "") -> str:
    r"""Return what is shown for a secret: its quotes stay, so that the rest of a script remains readable.

    Args:
        value: The secret, perhaps in quotes: ``"x"``, ``'x'``, ``\"x\"``.
        closing: The quotes that were opened before it.
    """
    if closing:
        return _HIDDEN + (closing[::-1] if value.endswith(closing[::-1]) else "")
    mark = value[: len(value) - len(value.lstrip("\\")) + 1]
    if mark[-1:] not in ("'", '"'):
        return _HIDDEN
    inner = value.rstrip(_TRAILING)
    closed = inner.endswith(mark) and len(inner) > len(mark)
    return mark + _HIDDEN + (mark + value[len(inner) :] if closed else "")

"""What a job is called that was given no name: its program, or the script that an interpreter runs. Pure.

`tailspan run` imports this before it starts the command: nothing here may import slowly.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

__all__ = ["default_name", "shell_name"]

_SCRIPT_SUFFIXES = (
    ".py", ".pyz", ".sh", ".bash", ".zsh", ".rb", ".pl", ".js", ".mjs", ".cjs", ".ts", ".mts", ".R", ".r", ".php",
    ".jar", ".ps1", ".lua", ".jl", ".groovy", ".kts", ".exs", ".tcl",
)  # fmt: skip


class _Options:
    """How to skip a program's options.

    Attributes:
        inline: Letters and long options whose value is a script: there is no file to be called after.
        values: Options that take the next argument.
        modules: Options whose value is a name: a module, a jar.
        letters: Whether single letters can be joined: ``-lc``.
        shell: Whether it is a shell: ``+e`` is an option, and ``-euo`` takes the next argument.
        lower: Whether the case of options does not matter.
    """

    def __init__(
        self,
        *,
        inline: str = "",
        values: str = "",
        modules: str = "",
        letters: bool = True,
        shell: bool = False,
        lower: bool = False,
    ) -> None:
        self.inline = frozenset(inline.split())
        self.values = frozenset(values.split())
        self.modules = frozenset(modules.split())
        self.letters = letters
        self.shell = shell
        self.lower = lower


# As plain tables: only the one that is needed becomes an object.
_PYTHON: dict[str, Any] = {"inline": "-c", "values": "-W -X -Q --check-hash-based-pycs", "modules": "-m"}
_SHELL: dict[str, Any] = {
    "shell": True,
    "inline": "-c --command",
    "values": "-o +o -O +O --rcfile --init-file -C --init-command --features",
}
_INTERPRETERS: dict[str, dict[str, Any]] = {
    "python": _PYTHON,
    "pythonw": _PYTHON,
    "pypy": _PYTHON,
    "ipython": {"inline": "-c", "values": "--profile --matplotlib", "modules": "-m"},
    **dict.fromkeys(("sh", "bash", "dash", "ash", "zsh", "ksh", "mksh", "fish", "csh", "tcsh", "rbash"), _SHELL),
    "perl": {"inline": "-e -E", "values": "-I -x -0", "modules": ""},
    "ruby": {"inline": "-e", "values": "-I -r -C -E -W -x --require --encoding"},
    "node": {
        "inline": "-e -p -pe --eval --print",
        "values": "-r --require --import --loader --experimental-loader -C --conditions --env-file --input-type",
        "letters": False,
    },
    "nodejs": {"inline": "-e -p -pe --eval --print", "values": "-r --require --import --loader", "letters": False},
    "bun": {"inline": "-e -p --eval --print", "values": "-r --preload --cwd -c --config", "letters": False},
    "deno": {"values": "-c --config --import-map --lock --cert --log-level -L", "letters": False},
    "php": {"inline": "-r -B -R -E --run --process-begin --process-code", "values": "-c -d -z", "modules": "-f -F"},
    "Rscript": {"inline": "-e", "values": "", "letters": False},
    "R": {"inline": "-e", "values": "--args", "modules": "-f", "letters": False},
    "lua": {"inline": "-e", "values": "-l"},
    "julia": {"inline": "-e -E --eval --print", "values": "-p -t -L -J --project --threads --procs --load -C -O"},
    "java": {
        "values": "-cp -classpath --class-path -p --module-path --add-modules --add-opens --add-exports --add-reads",
        "modules": "-jar -m --module",
        "letters": False,
    },
    "pwsh": {
        "lower": True,
        "inline": "-command -c -encodedcommand -e -ec -enc --command",
        "values": "-executionpolicy -ep -ex -workingdirectory -wd -configurationname -outputformat -o -inputformat "
        "-version -v -windowstyle -w -settingsfile",
        "modules": "-file -f",
        "letters": False,
    },
    "tclsh": {"letters": True},
    "groovy": {"inline": "-e", "values": "-cp --classpath -classpath"},
    "osascript": {"inline": "-e", "values": "-l"},
    "awk": {"inline": "", "values": "-F -v", "modules": "-f"},
    "scala": {"inline": "-e", "values": "-cp -classpath"},
    "elixir": {"inline": "-e --eval", "values": "-r -pa -pz --name --sname --cookie"},
    "spark-submit": {
        "values": "--master --deploy-mode --class --name --jars --packages --repositories --py-files --files --conf "
        "--properties-file --driver-memory --driver-java-options --driver-library-path --driver-class-path "
        "--executor-memory --executor-cores --num-executors --total-executor-cores --queue --proxy-user --principal "
        "--keytab --archives --exclude-packages --driver-cores -c --status --kill",
        "letters": False,
    },
}  # fmt: skip
_INTERPRETERS["powershell"] = _INTERPRETERS["pwsh"]
_INTERPRETERS["gawk"] = _INTERPRETERS["mawk"] = _INTERPRETERS["awk"]


class _Wrapper(_Options):
    """A program that runs another command.

    Attributes:
        words: Subcommands; one of them comes before the command: ``run`` of ``uv run``.
        positional: How many arguments precede the command: 1 for the time of ``timeout``.
        assignments: Whether ``NAME=value`` may precede the command.
    """

    def __init__(
        self,
        *,
        inline: str = "",
        values: str = "",
        modules: str = "",
        words: str = "",
        positional: int = 0,
        assignments: bool = False,
        letters: bool = True,
    ) -> None:
        super().__init__(inline=inline, values=values, modules=modules, letters=letters)
        self.words = frozenset(words.split())
        self.positional = positional
        self.assignments = assignments


_PLAIN: dict[str, Any] = {}
_PACKAGE_RUN: dict[str, Any] = {"words": "run", "values": "-p --project --python --directory -C -P", "letters": False}
_WRAPPERS: dict[str, dict[str, Any]] = {
    "env": {"values": "-u --unset -C --chdir -a --argv0", "assignments": True},
    "nice": {"values": "-n --adjustment"},
    "ionice": {"values": "-c --class -n --classdata"},
    "chrt": {"values": "-T --sched-runtime -P --sched-period -D --sched-deadline", "positional": 1},
    "taskset": {"values": "", "positional": 1},
    "numactl": {"values": "-i -N -m -C -p -P --interleave --cpunodebind --membind --physcpubind --preferred"},
    "timeout": {"values": "-k --kill-after -s --signal", "positional": 1},
    "gtimeout": {"values": "-k --kill-after -s --signal", "positional": 1},
    "flock": {"inline": "-c --command", "values": "-w --timeout --wait -E --conflict-exit-code", "positional": 1},
    "lockf": {"values": "-t", "positional": 1},
    "chronic": _PLAIN,
    "nohup": _PLAIN,
    "setsid": _PLAIN,
    "exec": {"values": "-a"},
    "command": _PLAIN,
    "builtin": _PLAIN,
    "busybox": _PLAIN,
    "catchsegv": _PLAIN,
    "unbuffer": _PLAIN,
    "fakeroot": {"values": "-l --lib -s -i -b --faked"},
    "proxychains": {"values": "-f"},
    "time": {"values": "-f --format -o --output"},
    "gtime": {"values": "-f --format -o --output"},
    "stdbuf": {"values": "-i -o -e --input --output --error"},
    "sudo": {
        "values": "-u --user -g --group -h --host -p --prompt -C --close-from -r --role -t --type -T "
        "--command-timeout -U --other-user -D --chdir -R --chroot",
        "assignments": True,
    },
    "doas": {"values": "-u -C"},
    "runuser": {"inline": "-c --command", "values": "-u --user -g --group -G --supp-group -s --shell"},
    "setpriv": {
        "values": "--reuid --regid --groups --inh-caps --ambient-caps --bounding-set --securebits --pdeathsig "
        "--selinux-label --apparmor-profile",
    },
    "gosu": {"positional": 1},
    "su-exec": {"positional": 1},
    "chroot": {"values": "--userspec --groups", "positional": 1},
    "chpst": {"values": "-u -U -b -/ -n -l -L -m -d -o -p -f -c -t -e"},
    "unshare": {"values": "--map-user --map-group --setgroups -R --root -w --wd -S --setuid -G --setgid"},
    "dumb-init": {"values": "-r --rewrite"},
    "tini": {"values": "-e -p"},
    "catatonit": _PLAIN,
    "strace": {"values": "-e -o -s -p -P -u -E -a -b -O -S -I"},
    "ltrace": {"values": "-e -o -s -p -u -a -l -n -A -D -F"},
    "perf": {"words": "record stat trace", "values": "-e --event -o --output -F --freq -p -c --count"},
    "valgrind": {"letters": True},
    "xvfb-run": {"values": "-n --server-num -e --error-file -f --auth-file -s --server-args -p -w --wait"},
    "dbus-run-session": {"values": "--config-file --dbus-daemon"},
    "systemd-run": {
        "values": "-u --unit -p --property -M --machine -H --host --description --slice -E --setenv --uid --gid --nice "
        "--working-directory --service-type --on-calendar --on-active",
    },
    "systemd-inhibit": {"values": "--what --who --why --mode"},
    "systemd-cat": {"values": "-t --identifier -p --priority --stderr-priority"},
    "caffeinate": {"values": "-t -w"},
    "srun": {
        "values": "-A --account -c --cpus-per-task -C --constraint -D --chdir -e --error -G --gpus -i --input -J "
        "--job-name -m --distribution --mem -n --ntasks -N --nodes --ntasks-per-node -o --output -p --partition -q "
        "--qos -t --time -w --nodelist -x --exclude --gres --mpi --export --cpu-bind --gpus-per-task --gpus-per-node",
    },
    "mpirun": {
        "values": "-n -np -c -H --host -hostfile --hostfile -machinefile --map-by --bind-to -x -f -ppn -hosts -N -wdir",
        "letters": False,
    },
    "aws-vault": {"words": "exec", "values": "-d --duration --region", "positional": 1, "letters": False},
    "chamber": {"words": "exec", "positional": 1, "letters": False},
    "op": {"words": "run", "values": "--env-file --account", "letters": False},
    "doppler": {"words": "run", "values": "-p --project -c --config -t --token", "letters": False},
    "infisical": {"words": "run", "values": "--env --path --projectId --token", "letters": False},
    "dotenv": {"words": "run", "values": "-f --file -e --env -q", "letters": False},
    "direnv": {"words": "exec", "positional": 1, "letters": False},
    "honcho": {"words": "run", "values": "-e --env -f -d", "letters": False},
    "foreman": {"words": "run", "values": "-e --env -f -d", "letters": False},
    "poetry": _PACKAGE_RUN,
    "pdm": _PACKAGE_RUN,
    "pipenv": _PACKAGE_RUN,
    "rye": _PACKAGE_RUN,
    "hatch": {"words": "run", "values": "-e --env -p --project", "letters": False},
    "pixi": {"words": "run", "values": "-e --environment --manifest-path", "letters": False},
    "uv": {
        "words": "run tool",
        "values": "-p --python --with --with-editable --with-requirements --extra --group --only-group --no-group "
        "--env-file --project --directory --package --index --default-index -i "
        "--cache-dir --config-file --from -w",
        "modules": "-m --module -s --script",
        "letters": False,
    },
    "uvx": {"values": "-p --python --with --from --index", "letters": False},
    "pipx": {"words": "run", "values": "--spec --python --pip-args", "letters": False},
    "npx": {"values": "-p --package", "inline": "-c --call", "letters": False},
    "bunx": _PLAIN,
    "npm": {"words": "exec run run-script x", "values": "-w --workspace --prefix -C", "letters": False},
    "pnpm": {"words": "exec dlx run", "values": "-C --dir -F --filter", "letters": False},
    "yarn": {"words": "exec run dlx", "values": "--cwd", "letters": False},
    "bundle": {"words": "exec", "values": "--gemfile", "letters": False},
    "conda": {"words": "run", "values": "-n --name -p --prefix --cwd", "letters": False},
    "mamba": {"words": "run", "values": "-n --name -p --prefix --cwd", "letters": False},
    "micromamba": {"words": "run", "values": "-n --name -p --prefix --cwd -a --attach", "letters": False},
    "singularity": {"words": "exec", "values": "-B --bind --env --pwd -H --home", "positional": 1, "letters": False},
    "apptainer": {"words": "exec", "values": "-B --bind --env --pwd -H --home", "positional": 1, "letters": False},
    "coverage": {
        "words": "run", "values": "--rcfile --source --include --omit --data-file --concurrency --context",
        "modules": "-m",
        "letters": False,
    },
    "torchrun": {
        "values": "--nnodes --nproc_per_node --nproc-per-node --node_rank --node-rank --master_addr --master-addr "
        "--master_port --master-port --rdzv_backend --rdzv-backend --rdzv_endpoint --rdzv-endpoint --rdzv_id "
        "--rdzv-id --rdzv_conf --rdzv-conf --max_restarts --max-restarts --monitor_interval --start_method --role "
        "--log_dir --log-dir -r --redirects -t --tee",
        "modules": "-m --module",
        "letters": False,
    },
    "accelerate": {
        "words": "launch", "values": "--config_file --num_processes --num_machines --machine_rank --main_process_ip "
        "--main_process_port --mixed_precision --dynamo_backend --gpu_ids", "modules": "-m --module", "letters": False,
    },
    "deepspeed": {
        "values": "-H --hostfile -i --include -e --exclude --num_nodes --num_gpus --master_port --master_addr",
        "modules": "--module", "letters": False,
    },
    "opentelemetry-instrument": {
        "values": "--traces_exporter --metrics_exporter --logs_exporter --service_name --exporter_otlp_endpoint "
        "--exporter_otlp_protocol --tracer_provider --id_generator --configurator --distro",
        "letters": False,
    },
    "ddtrace-run": _PLAIN,
    "newrelic-admin": {"words": "run-program", "letters": False},
    "tailspan": {
        "words": "run", "values": "--name --attr --timeout --service --config --encoding", "letters": False,
    },
    "memray": {"words": "run", "values": "-o --output", "modules": "-m", "letters": False},
    "py-spy": {"words": "record", "values": "-o --output -d -r -f --format --rate --duration", "letters": False},
    "scalene": {"values": "--outfile --cpu-percent-threshold"},
    "xargs": {"values": "-n --max-args -P --max-procs -I -L -d --delimiter -a --arg-file -s -E"},
}  # fmt: skip
_WRAPPERS["orterun"] = _WRAPPERS["mpiexec"] = _WRAPPERS["mpirun"]
_WRAPPERS["proxychains4"] = _WRAPPERS["proxychains"]
_PERIOD = frozenset("0123456789.")


def default_name(command: Sequence[str]) -> str:
    """Return what a job is called that was given no name: its program, or the script that an interpreter runs.

    Wrappers are looked through. The text of an inline script, such as that of ``bash -c``, is never part of a name.

    Args:
        command: The command and its arguments, at least one.
    """
    # A file's name may be any bytes: bytes that are not UTF-8 cannot be sent to services, which take text.
    return _called(list(command)).encode("utf-8", "replace").decode()


def shell_name(line: str) -> str | None:
    """Return what a job is called that is a line for the shell: the first program or script that it runs.

    Args:
        line: What ``/bin/sh -c`` runs.

    Returns:
        None where the line begins with something else, as with a loop or a variable: the job is called after the shell.
    """
    import shlex  # takes milliseconds, and most commands are lists

    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|()<>\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, "#"
    words: list[str] = []
    name = None
    try:
        for word in lexer:
            if word[0] not in ";&|()<>\n":
                words.append(word)
            elif name := _first_name(words):
                break
            elif words and words[0] not in _PREPARING and not all(map(_is_assignment, words)):
                return None
            else:
                words = []
    except ValueError:  # a quote that does not end: the shell reports it
        return None
    name = name or _first_name(words)
    return name if name and name.isprintable() and len(name) <= _MAX_SHELL_NAME_CHARS else None


# What stands before the program in `cd DIRECTORY && PROGRAM`, and runs nothing itself.
_PREPARING = frozenset(("cd", "set", "export", "source", ".", "umask", "ulimit", "unset", "trap", "module"))
_SYNTAX = frozenset(("if", "for", "while", "until", "case", "function", "select", "{", "!", "[", "[[", "eval"))
_EXPANDED = frozenset("$`*?~{}")
_MAX_SHELL_NAME_CHARS = 100


def _is_assignment(word: str) -> bool:
    return word.partition("=")[0].isidentifier() and "=" in word


def _first_name(words: list[str]) -> str | None:
    """Return the name of a simple command; None if it only prepares, or its program is not known before it runs."""
    program = next((place for place, word in enumerate(words) if not _is_assignment(word)), None)
    if program is None or words[program] in _PREPARING or words[program] in _SYNTAX or not words[program]:
        return None
    name = default_name(words[program:])
    if _EXPANDED & set(name):
        name = default_name(words[program : program + 1])
    return None if _EXPANDED & set(name) else name


def _called(command: list[str]) -> str:
    fallback = _base(command[0])
    while command:
        program = command[0].rpartition("/")[2] or command[0]
        wrapper = _WRAPPERS.get(program)
        if wrapper is None:
            kind = _interpreter(program)
            return _shown(program) if kind is None else _script(program, kind, command[1:])
        fallback = _base(command[0])
        inner = _inside(_Wrapper(**wrapper), command[1:])
        if isinstance(inner, str):
            return inner
        command = inner
    return fallback


def _interpreter(program: str) -> _Options | None:
    stem = program.removesuffix(".exe")
    table = _INTERPRETERS.get(stem) or _INTERPRETERS.get(stem.rstrip("0123456789.").rstrip("-") or stem)
    return None if table is None else _Options(**table)


def _inside(wrapper: _Wrapper, arguments: list[str]) -> list[str] | str:
    """Return the command that a wrapper runs, empty without one; or the name, where an option gives one."""
    words, positional = wrapper.words, wrapper.positional
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        if argument == "--":
            position += 1
            if not positional and not words:
                break
            continue
        if _is_option(argument):
            found = _option(wrapper, argument)
            if found == "inline":
                return []
            if found == "module":
                return _shown(arguments[position + 1]) if position + 1 < len(arguments) else []
            position += 2 if found == "value" else 1
            continue
        if wrapper.assignments and "=" in argument and not argument.startswith("="):
            position += 1
        elif words:
            if argument not in words:
                return []  # another subcommand: it is the program itself that runs
            # `uv tool run`
            words = frozenset({"run"}) if argument == "tool" else frozenset()
            position += 1
        elif positional:
            positional -= 1
            position += 1
        else:
            break
    rest = arguments[position:]
    if rest and rest[0].endswith(_SCRIPT_SUFFIXES) and "/" not in rest[0]:
        return _base(rest[0])
    return rest


def _script(program: str, options: _Options, arguments: list[str]) -> str:
    """Return the name of the script that an interpreter runs; its own where it has none."""
    position = 0
    skip = {"run"} if program in ("deno", "bun") else set()
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if argument == "--":
            continue
        if argument == "-":
            return program  # the script comes from standard input
        if _is_option(argument) or (argument.startswith("+") and options.shell):
            found = _option(options, argument)
            if found == "inline":
                return program
            if found == "module":
                return _shown(arguments[position]) if position < len(arguments) else program
            if found.startswith("="):
                return _shown(found[1:])
            position += found == "value"
        elif argument in skip:
            skip = set()
        elif program.endswith("awk"):
            return program  # its first argument is the script itself
        else:
            return _base(argument) or program
    return program


def _is_option(argument: str) -> bool:
    return len(argument) > 1 and argument.startswith("-")


def _option(options: _Options, argument: str) -> str:
    """Return what an option is: ``flag``, ``value``, ``inline``, ``module``, or ``=NAME`` for ``-mNAME``."""
    name, equals, _ = argument.partition("=")
    if options.lower:
        name = name.lower()
    for kind, names in (("inline", options.inline), ("module", options.modules), ("value", options.values)):
        if name in names:
            return "flag" if equals and kind == "value" else kind
    if argument.startswith("--") or not options.letters:
        return "flag"
    # Joined letters: the first one that takes a value has the rest as its value, or the next argument.
    for place, letter in enumerate(argument[1:], 1):
        short, rest = argument[0] + letter, argument[place + 1 :]
        if short in options.inline or (short == "+c" and "-c" in options.inline):
            return "inline"
        if short in options.modules:
            return f"={rest}" if rest else "module"
        if short in options.values and (not options.shell or letter in "oO"):
            # A shell's -o takes the next argument also within a group: -euo pipefail.
            return "value" if not rest or options.shell else "flag"
        if letter in _PERIOD:
            return "flag"
    return "flag"


def _base(path: str) -> str:
    return _shown(path.rstrip("/").rpartition("/")[2] or path)


def _shown(name: str) -> str:
    """Return a program's or script's name without directory and suffix."""
    name = name.rpartition("/")[2] or name
    suffix = next((suffix for suffix in _SCRIPT_SUFFIXES if name.endswith(suffix)), "")
    return name.removesuffix(suffix) or name

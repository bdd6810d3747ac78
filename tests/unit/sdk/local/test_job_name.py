"""What a job is called that was given no name: a table of command lines."""

from __future__ import annotations

import shlex

import pytest

from tailspan.errors import ConfigError
from tailspan.local.job_name import default_name, shell_name
from tailspan.local.launch import Request

TABLE = """
/opt/etl/load                                                     | load
./load.sh x                                                       | load
python etl.py --date today                                        | etl
/usr/bin/python3.11 -u /srv/etl.py                                | etl
python3 -m etl.nightly --fast                                     | etl.nightly
python -metl.nightly                                              | etl.nightly
python -um etl.nightly                                            | etl.nightly
python -c 'print("hunter2")'                                      | python
python -uc 'print("hunter2")'                                     | python
python -Ic 'print(1)' etl.py                                      | python
python -W ignore x.py                                             | x
python -Wignore x.py                                              | x
python -X dev -X utf8 x.py                                        | x
python -Xdev x.py                                                 | x
python -bb -O -s x.py                                             | x
python                                                            | python
python -                                                          | python
python3.12 -m pip install x                                       | pip
pypy3 sim.py                                                      | sim
bash -c 'echo hunter2'                                            | bash
bash -lc 'echo hunter2'                                           | bash
bash -euxc 'echo hunter2'                                         | bash
bash -ec 'echo hunter2' name                                      | bash
bash -l -c 'echo hunter2'                                         | bash
bash --login -c 'echo hunter2'                                    | bash
bash --norc --noprofile -euo pipefail -c 'echo hunter2'           | bash
bash -euo pipefail x.sh                                           | x
bash -o pipefail -e x.sh                                          | x
bash -eo pipefail -c 'echo hunter2'                               | bash
bash +e -x x.sh                                                   | x
bash -O extglob x.sh                                              | x
bash --rcfile rc x.sh                                             | x
bash -eu run.bash                                                 | run
sh -ec 'echo hunter2'                                             | sh
/bin/sh -c 'echo hi'                                              | sh
sh -- x.sh                                                        | x
zsh -fc 'echo hunter2'                                            | zsh
dash -c 'echo hunter2'                                            | dash
fish -c 'echo hunter2'                                            | fish
fish --command 'echo hunter2'                                     | fish
fish --command='echo hunter2'                                     | fish
ksh -xc 'echo hunter2'                                            | ksh
perl -e 'print "hunter2"'                                         | perl
perl -ne 'print if /hunter2/' file                                | perl
perl -lane 'print' file                                           | perl
perl -I lib load.pl                                               | load
perl -Ilib load.pl                                                | load
perl -pi -e 's/hunter2//' file                                    | perl
ruby -e 'puts "hunter2"'                                          | ruby
ruby -rjson -e 'puts 1'                                           | ruby
ruby -r json -I lib load.rb                                       | load
node -e 'console.log("hunter2")'                                  | node
node -p '"hunter2"'                                               | node
node --eval 'hunter2()'                                           | node
node --eval='hunter2()'                                           | node
node --max-old-space-size=4096 build.mjs                          | build
node -r dotenv/config load.js                                     | load
node --import ./otel.mjs load.js                                  | load
deno run --allow-net load.ts                                      | load
php -r 'echo "hunter2";'                                          | php
php -d memory_limit=1G -f load.php                                | load
php load.php                                                      | load
Rscript model.R                                                   | model
Rscript -e 'print("hunter2")'                                     | Rscript
julia -t 4 -e 'println("hunter2")'                                | julia
julia --project=. sim.jl                                          | sim
lua -e 'print("hunter2")'                                         | lua
pwsh -Command 'Write-Host hunter2'                                | pwsh
pwsh -NoProfile -NonInteractive -c 'hunter2'                      | pwsh
pwsh -ExecutionPolicy Bypass -File load.ps1                       | load
pwsh -EncodedCommand aAB1AG4AdABlAHIAMgA=                         | pwsh
java -jar app.jar --port 1                                        | app
java -cp a.jar:b.jar com.example.Main                             | com.example.Main
java -Xmx4g -Dpassword=hunter2 -cp a.jar Main                     | Main
java -classpath a.jar -ea Main                                    | Main
awk '{print "hunter2"}' file                                      | awk
spark-submit --master yarn --class a.B job.py                     | job
env API_KEY=hunter2 python etl.py                                 | etl
env -i PATH=/bin load                                             | load
env -u HOME -C /srv ./load.sh                                     | load
nice -n 10 python etl.py                                          | etl
nice -10 python etl.py                                            | etl
ionice -c 3 nice -n 19 ./backup.sh                                | backup
timeout 10 python etl.py                                          | etl
timeout -k 5 -s INT 10m bash -c 'hunter2'                         | bash
timeout --kill-after=5 10m load                                   | load
flock -n /var/lock/x python etl.py                                  | etl
flock -w 10 /var/lock/x -c 'hunter2'                                | flock
flock /var/lock/x bash -lc 'hunter2'                                | bash
sudo -u etl -H python etl.py                                      | etl
sudo -E A=hunter2 load                                            | load
sudo -u etl bash -c 'hunter2'                                     | bash
runuser -u etl -- python etl.py                                   | etl
setpriv --reuid etl --clear-groups load                           | load
poetry run python etl.py                                          | etl
poetry run etl                                                    | etl
uv run etl.py                                                     | etl
uv run --with requests --python 3.12 etl.py                       | etl
uv run python -m etl.nightly                                      | etl.nightly
uv run -m etl.nightly                                             | etl.nightly
uv sync                                                           | uv
uvx ruff check                                                    | ruff
pipenv run python etl.py                                          | etl
hatch run load                                                    | load
conda run -n env python etl.py                                    | etl
conda run --no-capture-output -p /opt/env python -c 'hunter2'     | python
npx tsx load.ts                                                   | tsx
bundle exec ruby load.rb                                          | load
srun -n 4 --mem 4G python train.py                                | train
srun --ntasks=4 ./sim                                             | sim
mpirun -np 4 python train.py                                      | train
torchrun --nproc_per_node 8 train.py                              | train
torchrun --nproc-per-node=8 -m pkg.train                          | pkg.train
accelerate launch --num_processes 2 train.py                      | train
opentelemetry-instrument python etl.py                            | etl
opentelemetry-instrument --traces_exporter otlp python -c 'x'     | python
xvfb-run -a python render.py                                      | render
xvfb-run -s '-screen 0 1x1x24' ./render.sh                        | render
time -p python etl.py                                             | etl
time python etl.py                                                | etl
stdbuf -oL python etl.py                                          | etl
stdbuf -o L -e L load                                             | load
nohup ./load.sh                                                   | load
setsid -w python etl.py                                           | etl
exec python etl.py                                                | etl
caffeinate -i python etl.py                                       | etl
strace -f -o trace.txt python etl.py                              | etl
coverage run -m pytest                                            | pytest
coverage run etl.py                                               | etl
systemd-run --user --scope -p MemoryMax=1G python etl.py          | etl
chroot /srv /bin/load                                             | load
taskset -c 0,1 python etl.py                                      | etl
tini -- python etl.py                                             | etl
tailspan run --name x -- python etl.py                            | etl
env nice -n 5 timeout 10 stdbuf -oL bash -euo pipefail load.sh    | load
env                                                               | env
sudo                                                              | sudo
timeout 10                                                        | timeout
/                                                                 | /
.sh                                                               | .sh
"""
ROWS = [tuple(part.strip() for part in line.rsplit("|", 1)) for line in TABLE.strip().splitlines()]


@pytest.mark.parametrize(("line", "name"), ROWS)
def test_names(line: str, name: str) -> None:
    """Its program or script, through all wrappers, and never a part of an inline script."""
    assert default_name(shlex.split(line)) == name
    assert "hunter2" not in default_name(shlex.split(line))


def test_the_table_is_large_enough() -> None:
    """At least 80 command lines."""
    assert len(ROWS) >= 80


@pytest.mark.parametrize("name", ["نام\u200cها", "a\u200db", "a\u00a0b", "a\u3000b", "ü", "日本"])
def test_names_with_joiners_and_wide_spaces_are_accepted(name: str) -> None:
    """Zero-width joiners and no-break spaces belong to people's words."""
    assert Request(command=["true"], name=name).name == name


@pytest.mark.parametrize(("name", "shown"), [("a\nb", "U+000A"), ("a\x1bb", "U+001B"), ("a\u202eb", "U+202E")])
def test_refused_characters_are_shown_by_their_code_point(name: str, shown: str) -> None:
    """They could act on a terminal, or hide what is there."""
    with pytest.raises(ConfigError, match=f"must not have the character {shown.replace('+', '.')}"):
        Request(command=["true"], name=name)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("echo hi", "echo"),
        ("  ./run.sh > out", "run"),
        ("TOKEN=hunter2 python etl.py", "etl"),
        ("cd data && python etl.py | tee log", "etl"),
        ("set -e\npython -m pkg.job --key hunter2", "pkg.job"),
        ("source venv/bin/activate; exec dbt run", "dbt"),
        ("export TOKEN=hunter2; curl -H hunter2 localhost", "curl"),
        ("(cd data; make)", "make"),
        ("python - <<EOF\nprint('hunter2')\nEOF", "python"),
        ("python -c 'hunter2'", "python"),
        ("python $SCRIPT", "python"),
        ("sh -c 'echo hunter2'", "sh"),
        ("# nightly\nmake all", "make"),
        ("true", "true"),
        ("cat file | wc -c", "cat"),
        ("for name in a b; do echo $name; done", None),
        ("if test -e x; then make; fi", None),
        ("$PROGRAM --all", None),
        ("echo 'open", None),
        ("TOKEN=hunter2", None),
        ("cd data", None),
        ("", None),
        ("'a\x07b'", None),
    ],
)
def test_a_line_for_the_shell_is_called_after_its_first_program(line, name):
    """What only prepares is skipped; a name that is not known before it runs is none, and secrets are never part."""
    assert shell_name(line) == name

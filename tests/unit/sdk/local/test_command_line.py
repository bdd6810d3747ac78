"""What a job is called, what is shown of its command, and the environment it gets: pure functions."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan.local.command_line import default_name, redact_attributes, redact_command, redact_name
from tailspan.local.environment import job_environment, parent_of


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["/opt/etl/load"], "load"),
        (["./load.sh", "x"], "load"),
        (["python", "etl.py", "--date", "today"], "etl"),
        (["/usr/bin/python3.11", "-u", "/srv/etl.py"], "etl"),
        (["python3", "-m", "etl.nightly", "--fast"], "etl.nightly"),
        (["python", "-c", "print(1)"], "python"),
        (["bash", "-eu", "run.bash"], "run"),
        (["sh", "-c", "echo hi"], "sh"),
        (["uv", "run", "etl.py"], "etl"),
        (["Rscript", "model.R"], "model"),
        (["python"], "python"),
        (["/"], "/"),
        ([".sh"], ".sh"),
        (["/opt/caf\udce9"], "caf?"),
        (["python", "-m", "caf\udce9.nightly"], "caf?.nightly"),
    ],
)
def test_a_job_is_called_after_its_program_or_script(command, name):
    """A name is what the runs of one pipeline have in common."""
    assert default_name(command) == name


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["load", "--password", "hunter2", "x"], ["load", "--password", "***", "x"]),
        (["load", "--db-password=hunter2"], ["load", "--db-password=***"]),
        (["load", "-token", "hunter2"], ["load", "-token", "***"]),
        (["load", "--no-token", "--fast"], ["load", "--no-token", "--fast"]),
        (["env", "API_KEY=hunter2", "load"], ["env", "API_KEY=***", "load"]),
        (["load", "postgres://me:hunter2@db/x"], ["load", "postgres://***@db/x"]),
        (["load", "https://hunter2@host/x?a=b"], ["load", "https://***@host/x?a=b"]),
        (["load", "https://h/x?access_token=hunter2&a=b"], ["load", "https://h/x?access_token=***&a=b"]),
        (["curl", "-H", "Authorization: Bearer hunter2"], ["curl", "-H", "Authorization: ***"]),
        (["sh", "-c", "curl -H 'Authorization: Basic hunter2' x"], ["sh", "-c", "curl -H 'Authorization: ***' x"]),
        (["sh", "-c", "PGPASSWORD='hunter2' psql"], ["sh", "-c", "PGPASSWORD='***' psql"]),
        (["load", "ghp_" + "a" * 36], ["load", "***"]),
        (["load", "--author", "me", "--date=2026-01-01"], ["load", "--author", "me", "--date=2026-01-01"]),
        (["python", "etl.py", "s3://bucket/key"], ["python", "etl.py", "s3://bucket/key"]),
    ],
)
def test_secrets_are_hidden(command, shown):
    """By the name before it, by its own form, or in a URL; what is none stays."""
    assert redact_command(command) == shown


HIDDEN = r"""
load --pass hunter2                                           | load --pass ***
load --auth hunter2 --author me --auth-type basic             | load --auth *** --author me --auth-type basic
load --bearer=hunter2 --user-pass hunter2                     | load --bearer=*** --user-pass ***
env DB_PASS=hunter2 PW=hunter2 STRIPE_KEY=hunter2 load        | env DB_PASS=*** PW=*** STRIPE_KEY=*** load
mysql -uroot -phunter2 db                                     | mysql -uroot -p*** db
mysql -u root -p db                                           | mysql -u root -p db
docker exec db mysqldump -phunter2                            | docker exec db mysqldump -p***
docker run -p 80:80 -ePASS=hunter2 x                          | docker run -p 80:80 -ePASS=*** x
docker login -u me -p hunter2 reg                             | docker login -u me -p *** reg
sshpass -p hunter2 ssh -p 22 host                             | sshpass -p *** ssh -p 22 host
mysqladmin -u root password hunter2                           | mysqladmin -u root password ***
pdftk in.pdf output out.pdf user_pw hunter2                   | pdftk in.pdf output out.pdf user_pw ***
kubectl create secret generic x --from-literal=foo=hunter2    | kubectl create secret generic x --from-literal=***
winexe -U me%hunter2 //host dir                               | winexe -U *** //host dir
sshpass -phunter2 ssh host mysql -phunter2                    | sshpass -p*** ssh host mysql -p***
curl -u me:hunter2 -o x https://h                             | curl -u *** -o x https://h
curl -fsSLume:hunter2 https://h                               | curl -fsSLu*** https://h
curl -sSu me:hunter2 --proxy-user=me:hunter2 x                | curl -sSu *** --proxy-user=*** x
curl -H 'X-Api-Key: hunter2' '-HX-Auth-Token: hunter2 x'      | curl -H 'X-Api-Key: ***' '-HX-Auth-Token: ***'
curl -H 'Authorization: Digest u="x", response="hunter2"'     | curl -H 'Authorization: ***'
wget --header='Cookie: a=b; c=hunter2'                        | wget '--header=Cookie: ***'
redis-cli -a hunter2 ping                                     | redis-cli -a *** ping
openssl enc -pass pass:hunter2 -in x                          | openssl enc -pass *** -in x
sqlplus scott/hunter2@db @x.sql                               | sqlplus scott/*** @x.sql
7z a -phunter2 x.7z                                           | 7z a -p*** x.7z
aws configure set aws_secret_access_key hunter2               | aws configure set aws_secret_access_key ***
load postgres://me:hun@ter2/hunter2@db/x                      | load postgres://***@db/x
load http://host:80/x@y git+https://h/a/b@v1                  | load http://host:80/x@y git+https://h/a/b@v1
java -Dpassword=hunter2 -Ddb.pass=hunter2 -jar x.jar          | java -Dpassword=*** -Ddb.pass=*** -jar x.jar
load '--from-literal=password=a hunter2'                      | load '--from-literal=password=***'
load '{"password": "a hunter2", "user": "b"}'                 | load '{"password": "***", "user": "b"}'
python -c 'connect(password="a hunter2", user="x")'           | python -c 'connect(password="***", user="x")'
bash -c 'export PW=hunter2; run'                              | bash -c 'export PW=***; run'
bash -c 'DB_PASS="a hunter2" cmd --x'                         | bash -c 'DB_PASS="***" cmd --x'
sh -c 'load --password "a hunter2" --x y'                     | sh -c 'load --password "***" --x y'
sh -c 'load "{\"password\": \"a hunter2\", \"x\": 1}"'         | sh -c 'load "{\"password\": \"***\", \"x\": 1}"'
sh -c 'load "{\\\"pass\\\": \\\"a hunter2\\\"}"'                | sh -c 'load "{\\\"pass\\\": \\\"***\\\"}"'
bash -lc 'bash -c "mysql -phunter2 db" | sort -p 3'           | bash -lc 'bash -c "mysql -p*** db" | sort -p 3'
ssh host 'x=$(redis-cli -a hunter2); echo'                    | ssh host 'x=$(redis-cli -a ***); echo'
fish -c 'set -gx DB_PASSWORD hunter2; run'                    | fish -c 'set -gx DB_PASSWORD ***; run'
psql -p 5432 -c "ALTER USER x PASSWORD 'hunter2'"             | psql -p 5432 -c "ALTER USER x PASSWORD '***'"
pwsh -c '$password = "hunter2"; Connect -Password hunter2'    | pwsh -c '$password = "***"; Connect -Password ***'
load --max-tokens 4096 --tokenizer gpt2 --sort-key name       | load --max-tokens 4096 --tokenizer gpt2 --sort-key name
htpasswd -b file me hunter2                                   | htpasswd -b file me ***
htpasswd -nbB -C 10 me 'a hunter2'                            | htpasswd -nbB -C 10 me ***
sh -c 'htpasswd -bn me "a hunter2" > file'                    | sh -c 'htpasswd -bn me "***" > file'
rabbitmqctl add_user me hunter2                               | rabbitmqctl add_user me ***
openssl passwd -6 -salt ab hunter2                            | openssl passwd -6 -salt ab ***
openssl rsa -passin pass:hunter2 -in x                        | openssl rsa -passin *** -in x
ssh-keygen -t rsa -N 'a hunter2' -f x                         | ssh-keygen -t rsa -N *** -f x
vault login hunter2                                           | vault login ***
vault kv put secret/x foo=hunter2 bar=hunter2                 | vault kv put secret/x foo=*** bar=***
net use x: //h/s hunter2 /user:me                             | net use x: //h/s *** /user:me
xfreerdp /u:me /p:hunter2 /v:h                                | xfreerdp /u:me /p:*** /v:h
az login -u me -p hunter2 --password hunter2                  | az login -u me -p *** --password ***
load -u me:hunter2 --user=me:hunter2 --login 'me:a hunter2'   | load -u *** --user=*** --login ***
psql 'host=h password=hunter2 dbname=d'                       | psql 'host=h password=*** dbname=d'
load 'Server=h;Uid=me;Pwd=a hunter2;Database=d'               | load 'Server=h;Uid=me;Pwd=***;Database=d'
load 'AccountName=a;AccountKey=hunter2=;Suffix=b'             | load 'AccountName=a;AccountKey=***;Suffix=b'
load 'ftp://me:a hunter2@h/x' '--url=ftp://me:a hunter2@h/x'   | load 'ftp://***@h/x' '--url=ftp://***@h/x'
sh -c 'curl "ftp://me:a hunter2@h"; curl ftp://u:a\ hunter2@h' | sh -c 'curl "ftp://***@h"; curl ftp://***@h'
java jdbc:oracle:thin:me/hunter2@h:1521/x                     | java jdbc:oracle:thin:***@h:1521/x
load '{"passwords": ["hunter2", "b"], "user": "c"}'           | load '{"passwords": ***, "user": "c"}'
load '{"auth": {"value": "hunter2", "b": {"c": 1}}, "d": 2}'   | load '{"auth": ***, "d": 2}'
load '{user: me, password: a hunter2, host: b}'               | load '{user: me, password: ***, host: b}'
sh -c 'echo me:hunter2 "a hunter2" | chpasswd'                | sh -c 'echo *** "***" | chpasswd'
sh -c 'printf %s hunter2 | docker login --password-stdin r'   | sh -c 'printf *** *** | docker login --password-stdin r'
sh -c 'docker login --password-stdin <<< "hunter2"; x'        | sh -c 'docker login --password-stdin <<< "***"; x'
"""

YAML = (
    "user: me\npassword: a hunter2\nkeys:\n  - api_key: hunter2 b\n  - token: |\n      hunter2\n      hunter2\nhost: h"
)


def test_secrets_in_yaml_are_hidden_to_the_end_of_their_value() -> None:
    """A value without quotes may have spaces, and more lines."""
    shown = "user: me\npassword: ***\nkeys:\n  - api_key: ***\n  - token: ***\nhost: h"
    assert redact_command(["load", YAML]) == ["load", shown]


@pytest.mark.parametrize("row", HIDDEN.strip().splitlines())
def test_secrets_are_hidden_as_programs_take_them(row):
    """By a program's own option, in scripts, quotes and headers; other options of the same spelling stay."""
    command, shown = row.rsplit(" | ", 1) if row.count(" | ") == 1 else row.split("  | ")
    assert redact_command(shlex.split(command)) == shlex.split(shown)


UNCHANGED = r"""
train --tokenizer gpt2 --max_new_tokens=5 --passes 3
docker run -p 80:80 -u 1000:1000 --name x img
rsync -az -e 'ssh -p 2222' a b
python -m pytest -k password -p no:cacheprovider tests/test_auth.py
grep -i password file.txt
mysql -P 3306 -u root db
curl -fsSL https://get.example.com -o x.sh
bash -c 'set -euo pipefail; cd "$(pwd)"; ./run --auth-mode oidc'
python -c 'import secrets; print(secrets.token_hex(4))'
sh -c 'echo "Status: pass"; echo password changed'
aws s3 cp s3://b/key . --profile x
redis-cli -h x -p 6379 -n 1 ping
docker compose -p proj up
docker run -u app:staff --user=app:staff x
docker login -u me --password-stdin registry.example.com
rsync -u host:dir/a b
date -u +%H:%M
load --password-file /run/secrets/x POSTGRES_PASSWORD_FILE=/run/secrets/x
load -u app:app -u 1000:1000 -u https://h/x
git push -u origin HEAD:main
htpasswd -c file me
kubectl config set-credentials me
sh -c 'echo a:b | sort; cat <<< "text"'
sh -c 'FOO=a; BAR=b c; run'
"""


@pytest.mark.parametrize("line", UNCHANGED.strip().splitlines())
def test_what_has_no_secret_stays(line):
    """A command stays readable: only secrets are hidden."""
    assert redact_command(shlex.split(line)) == shlex.split(line)


def test_secrets_in_names_and_attributes():
    """In a name that was given, in an attribute's key or value, and by an attribute's key."""
    assert redact_name("load --password hunter2") == "load --password ***"
    given = {"password": "hunter2", "db": "pg://u:hunter2@h", "pw=hunter2": "x", "token_count": "5", "team": "geo"}
    shown = {"password": "***", "db": "pg://***@h", "pw=***": "x", "token_count": "5", "team": "geo"}
    assert redact_attributes(given) == shown


@pytest.mark.parametrize("part", ["://a:", "mysql -p", "password ", "pw=", "a'b\"", "password='", "( ", "eyJ", "a=:"])
def test_the_longest_argument_takes_no_quadratic_time(part):
    """An argument may have 128 KB; what a pattern repeats is bounded."""
    assert len(redact_command(["load", part * (4096 // len(part))])) == 2


@given(st.lists(st.text(), min_size=1))
def test_redaction_keeps_the_number_of_arguments(command):
    """Whatever the arguments are, one is shown for each, and the program stays what it is."""
    assert len(redact_command(command)) == len(command)


PARTS = [shlex.split(row.rpartition("  | ")[0] or row.partition(" | ")[0]) for row in HIDDEN.strip().splitlines()]


@given(
    st.lists(st.one_of(st.sampled_from([word for words in PARTS for word in words]), st.text(max_size=9)), min_size=1)
)
def test_redaction_of_a_command_is_idempotent(command):
    """What is shown of a command is shown like that also where it is redacted again."""
    shown = redact_command(command)
    assert redact_command(shown) == shown


VALID = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize(
    ("given", "parent"),
    [
        (VALID, VALID),
        (f" {VALID.upper()} ", VALID),
        ("", None),
        ("garbage", None),
        (VALID.replace("0af7651916cd43dd8448eb211c80319c", "0" * 32), None),
        (VALID.replace("b7ad6b7169203331", "0" * 16), None),
        ("ff" + VALID[2:], None),
    ],
)
def test_only_a_valid_parent_counts(given, parent):
    """A traceparent that the standard forbids is as good as none."""
    assert parent_of({"TRACEPARENT": given}) == parent


def environment(inherited: dict[str, str], **options: object) -> dict[str, str]:
    """Return a job's environment."""
    given = {"job_id": "j", "name": "etl", "trace_id": "t" * 32, "span_id": "s" * 16, "otlp": {}, **options}
    return job_environment(inherited, **given)


def test_a_name_that_was_given_stays():
    """The program's own service name wins over the job's, but not the name of the job around it."""
    assert environment({"OTEL_SERVICE_NAME": "mine"})["OTEL_SERVICE_NAME"] == "mine"
    outer = environment({}, name="outer job")
    assert environment(outer)["OTEL_SERVICE_NAME"] == "etl"
    assert environment(outer)["OTEL_RESOURCE_ATTRIBUTES"] == "cicd.pipeline.name=etl,cicd.pipeline.run.id=j"


def test_all_else_passes_unchanged():
    """What we know nothing of is not touched, and the caller's mapping neither."""
    inherited = {"PATH": "/bin", "TRACESTATE": "a=b", "X": "=,="}
    result = environment(inherited)
    assert (result["PATH"], result["X"]) == ("/bin", "=,=")
    assert "TRACESTATE" not in result
    assert inherited["TRACESTATE"] == "a=b"

#!/bin/bash
# Boots this machine's own systemd in a container, on a copy-on-write view of this machine, installs the units as
# deploy/README.md says, and uses them: make test-systemd (as root; needs systemd-nspawn and Debian's python3-venv).
set -euo pipefail
if [ "${1:-}" != inside ]; then
  repository=$(cd "$(dirname "$0")/../.." && pwd)
  wheel=$(realpath "$1")
  work=$(mktemp -d)
  trap 'umount "$work/root" "$work/layers" 2>/dev/null; rm -rf --one-file-system "$work"' EXIT
  mkdir "$work/root" "$work/layers"
  mount -t tmpfs tmpfs "$work/layers"
  mkdir "$work/layers/upper" "$work/layers/work"
  mount -t overlay overlay -o "lowerdir=/,upperdir=$work/layers/upper,workdir=$work/layers/work" "$work/root"
  root=$work/root
  cp "$repository"/deploy/systemd/*.service "$repository"/deploy/systemd/*.timer "$root/etc/systemd/system/"
  cp "$repository/deploy/systemd/tailspan.conf" "$root/usr/lib/sysusers.d/"
  cp "$0" "$root/usr/local/bin/boot_units.sh"
  # Made below the copy, used at the same path without it: the programs in it name their own place.
  chroot "$root" /usr/bin/python3 -m venv --without-pip /opt/tailspan
  into() {
    "$repository/.venv/tools/bin/python" -m pip install -qq --only-binary :all: --target "$work/layers/packages" \
      --python-version "$(/usr/bin/python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')" "$@"
  }
  into --require-hashes --requirement "$repository/deploy/requirements.lock"
  into --no-deps "$wheel"
  cp -r "$work"/layers/packages/. "$root"/opt/tailspan/lib/python3*/site-packages/
  printf '#!/opt/tailspan/bin/python\nfrom tailspan.cli import main\nmain()\n' > "$root/usr/local/bin/tailspan"
  chmod 755 "$root/usr/local/bin/tailspan"
  echo 0123456789abcdef0123456789abcdef > "$root/etc/machine-id"
  ln -sf /dev/null "$root/etc/systemd/system/systemd-firstboot.service"
  ln -sf /dev/null "$root/etc/systemd/system/systemd-networkd-wait-online.service"
  printf '[Unit]\nRequires=basic.target try.service\nAfter=basic.target\n' > "$root/etc/systemd/system/try.target"
  printf '[Unit]\nAfter=basic.target dbus.service\nWants=dbus.service\n[Service]\nType=oneshot\nExecStart=/usr/local/bin/boot_units.sh inside\n' \
    > "$root/etc/systemd/system/try.service"
  ln -sf try.target "$root/etc/systemd/system/default.target"
  timeout 180 systemd-nspawn --quiet --register=no --keep-unit --directory="$root" --private-network --boot \
    < /dev/null > "$work/boot.log" 2>&1 || true
  cat "$root/try.log"
  grep -q '^ALL WELL$' "$root/try.log"
  exit
fi

trap 'systemctl poweroff' EXIT
exec > /try.log 2>&1
say() { echo "== $*"; }
url=http://127.0.0.1:8797
show() { systemctl show "$1" --property "$2" --value; }

say 'users, a configuration, tokens of root alone, two jobs'
systemd-sysusers
mkdir -p /etc/tailspan/jobs
printf '[agent]\nlisten = "0.0.0.0:8797"\n' > /etc/tailspan/config.toml
for name in page serve; do (umask 077; echo "$name-token" > "/etc/tailspan/$name.token"); done
printf '#!/bin/sh\nid -un; exit 3\n' > /etc/tailspan/jobs/short
printf '#!/bin/sh\necho started; sleep 300\n' > /etc/tailspan/jobs/long
chmod 755 /etc/tailspan/jobs/*
sed -i '/page/s/^#//' /etc/systemd/system/tailspan-agent.service
systemctl daemon-reload

say 'a job: its own user, its exit code'
systemctl start tailspan-job@short && exit 1
[ "$(show tailspan-job@short ExecMainStatus)" = 3 ]

say 'the agent: ready when it says so, token as credential, reads what the group may read'
systemctl start tailspan-agent
[ "$(show tailspan-agent ActiveState)" = active ]
pid=$(show tailspan-agent ExecMainPID)
for line in 'Seccomp:.2' 'CapBnd:.0*' 'NoNewPrivs:.1'; do grep "^$line$" "/proc/$pid/status"; done
[ "$(curl -s -o /dev/null -w '%{http_code}' $url/metrics)" = 401 ]
acked() { curl -s -H 'Authorization: Bearer page-token' $url/metrics | grep -E '^tailspan_agent_records_acked_total.* [1-9]'; }
for _ in $(seq 100); do acked && break; sleep 0.2; done
acked
systemctl reload tailspan-agent
[ "$(show tailspan-agent ActiveState)" = active ]

say 'the job API; a stop cancels a job'
systemctl start --no-block tailspan-job@long
systemctl start tailspan-serve
export TAILSPAN_STATE_DIR=/var/lib/tailspan-jobs
for _ in $(seq 100); do tailspan jobs | grep -q RUNNING && break; sleep 0.2; done
systemctl stop tailspan-job@long
tailspan jobs | grep CANCELED
[ "$(show tailspan-serve ActiveState)" = active ]
[ "$(curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:8798/server/v1/run)" = 401 ]

say 'an orderly stop; a hanging agent is started again; a wrong configuration is not'
systemctl stop tailspan-agent
[ "$(show tailspan-agent Result)" = success ]
mkdir -p /etc/systemd/system/tailspan-agent.service.d
printf '[Service]\nWatchdogSec=2\nRestartSec=1\n' > /etc/systemd/system/tailspan-agent.service.d/quick.conf
systemctl daemon-reload
systemctl start tailspan-agent
kill -STOP "$(show tailspan-agent ExecMainPID)"
for _ in $(seq 100); do [ "$(show tailspan-agent NRestarts)" = 1 ] && break; sleep 0.2; done
[ "$(show tailspan-agent NRestarts)" = 1 ]
echo 'nokey = 1' > /etc/tailspan/config.toml
systemctl restart tailspan-agent && exit 1
[ "$(show tailspan-agent ExecMainStatus)" = 2 ]
[ "$(show tailspan-agent NRestarts)" = 0 ]
echo 'ALL WELL'

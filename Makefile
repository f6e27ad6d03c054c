# Every target sets itself up: `git clone` and `make demo` (or `make test`) is all there is to do.
VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two workers with one thread each: a toy model gains nothing from a second thread.
# Files in the order of their names: by default xdist deals those with the most tests first, and the few long ones last, one core idle.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
APT := chromium chromium-driver zsh slurmctld slurmd slurm-client munge slurmdbd slurm-wlm-mysql-plugin mariadb-server-core mariadb-client-core

.PHONY: demo test test-fast lint apt clean

demo: $(STAMP)
	$(BIN)/flexpert pipeline pipeline=demo

test: $(STAMP) apt
	$(PYTEST)

test-fast: $(STAMP)
	$(PYTEST) -m "not slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# PyTorch's CPU build first: a plain requirement would bring several gigabytes of CUDA libraries to a machine without a
# GPU. Set TORCH to install another build, for example TORCH=torch on a GPU machine.
TORCH ?= torch==2.13.0
$(STAMP): setup.py
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed; set PYTHON to it"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@

# The report's test opens it in a browser, the overrides' test types them into zsh, Slurm's tests start a cluster. Where
# packages cannot be installed, these tests say how and are skipped.
apt:
	@PATH="$$PATH:/usr/sbin" which chromium chromedriver zsh slurmctld slurmd sbatch munged slurmdbd mariadbd >/dev/null || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(APT) >/dev/null \
		|| echo "note: $(APT) could not be installed; the tests that need them say so"; \
	else echo "note: install $(APT) to run the tests that need them"; fi

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache runs/demo runs/smoke

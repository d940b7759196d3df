# `make demo` and `make test` need nothing but Python 3.11 (or newer) and make: the environment makes itself.
#
# `make setup` takes the versions of lock/requirements.txt, which were tested, and where the index lacks one, what the ranges
# of pyproject.toml allow. LOCKED=1 makes the environment anew and takes files by the lock's hashes alone, or fails. LOCKED=try
# takes them by their hashes too, and goes back where the index lacks a version.
#
# TORCH_INDEX is the index that torch, and nothing else, comes from: for its CPU build, which is much smaller than the CUDA
# build. PIP_FLAGS is passed to pip.

PYTHON      ?= python3
PIP_FLAGS   ?=
TORCH_INDEX ?=
LOCKED      ?=
VENV        := .venv
BIN         := $(VENV)/bin
# An environment of LOCKED=1 does for everything; another does not for LOCKED=1.
STAMP       := $(VENV)/.installed$(if $(filter 1,$(LOCKED)),-by-hashes)
LOWEST      := .venv-lowest
PROTO       := .venv-proto
TEST_PROCESSES ?= 3
PACKAGES    := backbone cli cloud common daemon edge emulator experiments kernels planner privacy protocol rpc training
HASHES      := $(if $(LOCKED),--hashes $(if $(filter try,$(LOCKED)),where-had,required))

.PHONY: setup demo test test-long test-lowest fuzz lint format proto vectors lock audit release conformance bench bench-wire bench-emulators clean

setup: $(STAMP)

$(VENV)/.installed $(VENV)/.installed-by-hashes: pyproject.toml lock/requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "isthmus needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(if $(LOCKED),--clear) $(VENV)
	$(BIN)/python lock/install.py --extras dev $(HASHES) --torch-index="$(TORCH_INDEX)" -- $(PIP_FLAGS)
	mkdir -p .ns && ln -sfn .. .ns/isthmus
	$(BIN)/python -m compileall -q $(PACKAGES)
	rm -f $(VENV)/.installed-by-hashes
	touch $(VENV)/.installed $@

demo: $(STAMP)
	$(BIN)/isthmus demo

# Each process compiles each file of the tests, unless another run has left what it compiled, whatever the environment says.
test test-long test-lowest: export PYTHONDONTWRITEBYTECODE :=

PYTEST := -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	$(BIN)/python $(PYTEST) -m "not long" $(PYTEST_FLAGS)

# What takes ten seconds or more each: crashes, faults, simulations and benchmarks, at length.
test-long: $(STAMP)
	$(BIN)/python $(PYTEST) -m long $(PYTEST_FLAGS)

# The tests with the lowest versions that pyproject.toml allows of what it names, in an environment of its own.
test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python $(PYTEST) $(PYTEST_FLAGS)

$(LOWEST)/.installed: pyproject.toml | $(STAMP)
	$(PYTHON) -m venv --clear $(LOWEST)
	$(BIN)/uv pip compile --quiet --no-header --no-annotate --resolution lowest-direct --python $(LOWEST)/bin/python \
	  --extra dev --output-file $(LOWEST)/requirements.txt pyproject.toml
	$(LOWEST)/bin/python -m pip install --quiet $(PIP_FLAGS) --requirement $(LOWEST)/requirements.txt
	$(LOWEST)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# Fuzzes each decoder for FUZZ_SECONDS, FUZZ_JOBS at a time. What is found stays in .fuzz; FUZZ_FLAGS takes names of
# targets, --json, and --keep, which renews the corpus that `make test` replays.
FUZZ_SECONDS ?= 60
FUZZ_JOBS    ?= 2

fuzz: $(STAMP)
	@$(BIN)/python -c 'import atheris' \
	  || { echo "make fuzz needs atheris, which has wheels for Linux on x86-64 only: .venv/bin/pip install atheris"; exit 2; }
	PYTHONPATH=tests$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/python -P -m fuzz --seconds $(FUZZ_SECONDS) --jobs $(FUZZ_JOBS) $(FUZZ_FLAGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd .ns && MYPYPATH=. ../$(BIN)/mypy --config-file ../pyproject.toml $(foreach p,$(PACKAGES),-p isthmus.$(p))
	MYPYPATH=lock $(BIN)/mypy --config-file pyproject.toml lock
	cd .ns && ../$(BIN)/lint-imports ../pyproject.toml
	$(MAKE) --no-print-directory proto PROTO_OUT=$(PROTO)/made
	for made in $(foreach p,$(PROTOS),$(p)_pb2.py $(p)_pb2.pyi); do diff $(PROTO)/made/$$made $$made \
	  || { echo "$$made is not what its .proto gives: run make proto"; exit 1; }; done

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The Python code of the .proto files, in an environment of its own: the compiler's version is the oldest of the range
# of pyproject.toml, because a runtime refuses code that is newer than itself, and it does not go with newer ones.
PROTO_COMPILER := 1.76.0
PROTO_OUT      ?= .
PROTOS         := protocol/isthmus daemon/tinker/tinker_wire

proto: $(PROTO)/.installed-$(PROTO_COMPILER)
	for proto in $(PROTOS); do folder=$$(dirname $$proto); mkdir -p $(PROTO_OUT)/$$folder; \
	  $(PROTO)/bin/python -m grpc_tools.protoc -I $$folder --python_out=$(PROTO_OUT)/$$folder \
	    --pyi_out=$(PROTO_OUT)/$$folder $$(basename $$proto).proto || exit 1; done

$(PROTO)/.installed-$(PROTO_COMPILER):
	$(PYTHON) -m venv --clear $(PROTO)
	$(PROTO)/bin/python -m pip install --quiet $(PIP_FLAGS) grpcio-tools==$(PROTO_COMPILER)
	touch $@

# The known answers of tests/vectors, for a protocol that is meant to change; see the README there.
vectors: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m support.protocol.make_vectors

# The daemon's OpenAI API against the published document, CASES of each operation at least: ten minutes or so.
CASES ?= 560

conformance: $(STAMP)
	PYTHONPATH=tests$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/python -W ignore -m support.daemon.openai_conformance --cases $(CASES)

# Write lock/requirements.txt anew, with the newest versions that the ranges and lock/tested.txt allow.
lock: $(STAMP)
	$(BIN)/python lock/refresh.py

# Look the lock's versions up among the known vulnerabilities.
audit: $(STAMP)
	$(BIN)/python lock/audit.py $(AUDIT_FLAGS)

# A release of the commit that is checked out, in dist/: wheel, source archive, SBOM, SHA256SUMS; each time the same bytes.
release: $(STAMP)
	$(BIN)/python lock/release.py

# The figures of docs/results.md. Takes about three hours on two cores. DATA is the folder with e2e/, openbookqa/, arc_easy/,
# sst2/ and shakespeare/.
DATA ?= ../shared/data

bench: $(STAMP)
	$(BIN)/isthmus bench parity --model smollm2-135m --steps 10 --json
	$(BIN)/isthmus bench step --model smollm2-135m --json
	$(BIN)/isthmus bench step --model smollm2-135m --cloud-dtype bf16 --codec bf16 --json
	$(BIN)/isthmus bench step --model smollm2-135m --codec int8 --json
	$(BIN)/isthmus bench faults --json
	$(BIN)/isthmus bench chaos --seconds 600 --json
	$(BIN)/isthmus bench chaos --kinds worker_killed --tenants 1 --steps 60 --seconds 90 --json
	$(BIN)/isthmus bench chaos --soak --seconds 1800 --json
	$(BIN)/isthmus bench abuse --json
	$(BIN)/isthmus bench audit --json
	$(BIN)/isthmus bench tenants --n 8 --figure docs/figures/tenants.png --json
	$(BIN)/isthmus bench qos --json
	$(BIN)/isthmus bench daemon --json
	$(BIN)/isthmus bench kernels --json
	$(BIN)/isthmus bench quantize --data-folder $(DATA) --json
	$(BIN)/isthmus bench curve --data $(DATA)/e2e/train.csv --prompt-template 'Meaning: {mr}\nText:' --completion-template ' {ref}' \
	  --steps 200 --figure docs/figures/e2e-curve.png --json

# The figures of placements, codecs and slow links. Takes about six hours on two cores; what is finished is kept in WIRE,
# and the same command goes on there. The last one makes network namespaces, which needs root.
WIRE   ?= isthmus-wire
LINEAR := q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj

bench-wire: $(STAMP)
	$(BIN)/isthmus bench placements --no-scores --out $(WIRE) --json
	$(BIN)/isthmus bench placements --data-folder $(DATA) --steps 100 --seeds 1 --learning-rates 3e-3 --out $(WIRE) \
	  --figure docs/figures/placements.png --json
	$(BIN)/isthmus bench placements --no-costs --task openbookqa --data-folder $(DATA) --steps 100 --seeds 1 \
	  --learning-rates 3e-3 --out $(WIRE) --json
	$(BIN)/isthmus bench placements --no-costs --target-modules $(LINEAR) --data-folder $(DATA) --out $(WIRE) \
	  --modes single,kill_revive,random,even,kill_revive@0.083,random@0.083 \
	  --sites-figure docs/figures/live-sites.png --json
	$(BIN)/isthmus bench placements --no-costs --target-modules $(LINEAR) --data-folder $(DATA) --out $(WIRE) \
	  --modes single,kill_revive@0.05,random@0.05,kill_revive@0.083,random@0.083,kill_revive,random,even \
	  --seeds 1 --learning-rates 3e-3 --budget-figure docs/figures/budgets.png --json
	$(BIN)/isthmus bench codecs --data-folder $(DATA) --out $(WIRE) --json
	$(BIN)/isthmus bench link --rate 100mbit --rtt 50ms --json

# The figures of emulators. Takes some ten hours with one thread; what is finished is kept in TABLE, and the same command
# goes on there.
TABLE ?= isthmus-table

bench-emulators: $(STAMP)
	$(BIN)/isthmus emulator table --model smollm2-135m --data-folder $(DATA) --threads 1 --out $(TABLE) --json
	$(BIN)/isthmus emulator cost --model smollm2-135m --keep 0.5 --json

clean:
	rm -rf $(VENV) $(LOWEST) $(PROTO) .ns build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# Two commands matter: `make demo` and `make test`. Both prepare all that they need.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# The same with the oldest TensorFlow that is supported.
OLDEST := .venv-oldest

.PHONY: demo test test-oldest test-containers chaos images sbom scan docs lint env system-packages update-pins fuzz \
        clean clean-env clean-runs clean-models clean-cache bench-input-pipeline bench-serving bench-mapping bench-ladder bench-isolation bench-events bench-instrument bench-soak bench-fleet \
        peers-env bench-peers
.DEFAULT_GOAL := demo

env: $(READY)

$(READY): requirements.txt
$(OLDEST)/.ready: requirements-oldest.txt
# Without dependencies: the files name every package, and tf2crf would ask for tensorflow-addons (see pyproject.toml).
$(READY) $(OLDEST)/.ready: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: install it, or say PYTHON=python3.10 (or 3.12, 3.13)"; exit 1; }
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(filter requirements%,$^)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# Both requirements files with the newest versions that work together, on each Python and platform.
update-pins: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/python tests/support/update_pins.py

# What pip cannot install, on Debian or Ubuntu: a browser, Java, jemalloc, nginx, sshd. It needs root, or sudo without a password.
system-packages:
	.ci/system-packages

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# A worker that dies ends the run with a report: others would wait for its tests without end.
IN_PARALLEL := -n 2 --dist loadgroup --no-loadscope-reorder --max-worker-restart 0

# In the order of the folders: the containers take longest and begin first.
test: lint
	$(BIN)/python -m pytest $(IN_PARALLEL)

# With the oldest TensorFlow that is supported (2.20): what its C library, graphs, messages and checkpoints decide,
# and the server on top of them. OLDEST_TESTS="tests/unit tests/server" runs all of them.
OLDEST_TESTS := $(patsubst %,tests/unit/test_%.py,tensorflow_internals runtime mapping checkpoint tensors \
    tensors_against_tensorflow wire import_cost warmup_replay crf dependencies) \
    $(patsubst %,tests/server/test_%.py,mapped_swap lifecycle)
test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest $(IN_PARALLEL) $(OLDEST_TESTS)

# Images and the compose stack on a real container engine, started from the distribution's packages where none runs.
# `make test` includes them unless SPIKELESS_CONTAINERS=0.
test-containers: $(READY)
	$(BIN)/python -m pytest tests/bundle/test_containers.py

# Faults at random for CHAOS_SECONDS while load runs; CHAOS_SEED repeats a run.
CHAOS_SECONDS ?= 600
chaos: $(READY)
	PYTHONPATH=tests/support $(BIN)/python tests/support/chaos.py --seconds $(CHAOS_SECONDS) \
	    $(if $(CHAOS_SEED),--seed $(CHAOS_SEED))

# The images with labels that say where they come from. Builders that can, attach more, and give all files the time in
# SOURCE_DATE_EPOCH:
#   SOURCE_DATE_EPOCH=$(git log -1 --format=%ct) make images \
#       ATTESTATIONS="--no-cache --provenance=mode=max --sbom=true --output type=registry,rewrite-timestamp=true"
# `make sbom` lists what is in an image of any builder.
TAG          ?= latest
IMAGES       ?= serving embedded tools
ATTESTATIONS ?= --load
images:
	for image in $(IMAGES); do \
	    docker buildx build --file docker/Dockerfile --target $$image --tag spikeless/$$image:$(TAG) $(ATTESTATIONS) \
	        --secret id=pip_ca,src=$${PIP_CA_FILE:-/dev/null} \
	        --build-arg BASE --build-arg TF_SERVING_IMAGE --build-arg TF_SERVING_VERSION --build-arg TF_SERVING_VARIANT \
	        --build-arg REVISION="$$(git rev-parse HEAD)$$(git diff --quiet HEAD || echo -modified)" \
	        --build-arg SOURCE="$$(git config --get remote.origin.url)" \
	        --build-arg CREATED="$$(git log -1 --format=%cI)" . || exit 1; done

# CycloneDX, on standard output: make --silent sbom IMAGE=spikeless/embedded:latest > embedded.cdx.json
IMAGE ?= spikeless/embedded:$(TAG)
sbom:
	@python3 docker/sbom.py $(IMAGE)

# Known vulnerabilities of an image's Python packages, and Debian packages that its archive has a newer version of. It
# fails where there is one, and where a package is unknown to the index: no answer is no good news.
scan: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/python docker/scan.py $(IMAGE)

# Fuzz each parser of foreign bytes for FUZZ_SECONDS. Findings go to reports/.
FUZZ_SECONDS ?= 600
FUZZ_TARGETS := json tensor request infer_json infer_message http2 http2_answer tfrecord warmup checkpoint \
    rest store version models_config
fuzz: $(READY)
	cd reports && for target in $(FUZZ_TARGETS); do \
	    ../$(BIN)/python ../tests/fuzz/coverage_guided.py $$target -max_total_time=$(FUZZ_SECONDS) || exit 1; done

demo: $(READY)
	$(BIN)/spikeless demo

# The documentation as a site in site/; `make test` builds it too.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Run benchmarks on an otherwise idle machine.

# What each step of reading training records is worth.
bench-input-pipeline: $(READY)
	$(BIN)/python benchmarks/read_training_records.py

# What the embedded engine adds to a call, and what it saves over Flask, in closed and open loops, in 11 minutes.
# SERVER=/path/to/tensorflow_model_server takes turns with it.
bench-serving: $(READY)
	ls runs/factorization_machine-*/saved_model >/dev/null 2>&1 || $(BIN)/python training/train_factorization_machine.py
	$(BIN)/python benchmarks/serving.py --saved-model "$$(ls -d runs/factorization_machine-*/saved_model | tail -n 1)" \
	    $(if $(SERVER),--server $(SERVER))

# What mapping changes: memory, loads, swaps, throughput. SIZES="512MiB 2GiB 8GiB" for all of them (24 GiB of memory).
SIZES ?= 512MiB
bench-mapping: $(READY)
	$(BIN)/python benchmarks/mapping.py $(SIZES:%=--size %)

# Pulling versions with a table of 2 GiB over 1 Gbit/s, beside rsync and copies: as root, with iproute2, rsync and 16 GB.
bench-fleet: $(READY)
	$(BIN)/python benchmarks/fleet.py

# Whether the instrument reports stalls that are known exactly, and its floor, in 10 minutes.
bench-instrument: $(READY)
	$(BIN)/python benchmarks/instrument.py

# What a new version costs on other servers, each in an environment of its own: about a quarter of an hour, twice that
# with PEER_ROUNDS=2. With SPIKELESS_SERVER, TensorFlow Serving takes part.
PEERS       := $(patsubst benchmarks/peers/%/requirements.txt,%,$(wildcard benchmarks/peers/*/requirements.txt))
PEER_ROUNDS ?= 1
bench-peers: $(READY)
	$(BIN)/python benchmarks/bench_peers.py --rounds $(PEER_ROUNDS)

# 14 GB of packages, of which 4 remain where hardlink(1) is installed: most are TensorFlow, and the same.
peers-env: $(PEERS:%=.venv-peers/%/.ready)
	! command -v hardlink >/dev/null || hardlink --quiet --ignore-time .venv-peers

.venv-peers/%/.ready: benchmarks/peers/%/requirements.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

# Reloads, faults and kills under load for SOAK: does anything fail or grow?
SOAK ?= 1h
bench-soak: $(READY)
	$(BIN)/python benchmarks/soak.py --duration $(SOAK)

# What each remedy is worth: 10 reloads on each rung in about 12 minutes,
# ROUNDS=12 for 60 of them in little more than an hour.
SIZE      ?= 512MiB
ROUNDS    ?= 2
EMBEDDING := runs/embedding-$(SIZE)
bench-ladder: $(EMBEDDING)
	$(BIN)/spikeless bench ladder $(EMBEDDING)/1 $(EMBEDDING)/2 --requests $(EMBEDDING)/requests \
	    --title embedding-$(SIZE) --rounds $(ROUNDS)

# What each part of the library that keeps loads apart is worth, alone and in all: 10 reloads each in a quarter of an hour.
bench-isolation: $(EMBEDDING)
	make -C docker/isolate
	SPIKELESS_ISOLATE_LIBRARY="$${SPIKELESS_ISOLATE_LIBRARY:-$(CURDIR)/docker/isolate/libspikeless-isolate.so}" \
	    $(BIN)/python benchmarks/isolation.py $(EMBEDDING)/1 $(EMBEDDING)/2 --requests $(EMBEDDING)/requests

# What storms, unloads and reloads of other models cost: two rounds in about 15 minutes.
bench-events: $(EMBEDDING)
	$(BIN)/python benchmarks/events.py $(EMBEDDING)/1 $(EMBEDDING)/2 --requests $(EMBEDDING)/requests

$(EMBEDDING): | $(READY)
	$(BIN)/python benchmarks/make_embedding_model.py $@ --size $(SIZE)

# Each removes one kind of thing: `clean` what is made again in seconds, the others what takes longer, or is yours.
clean:
	rm -rf site build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The environments.
clean-env:
	rm -rf $(VENV) $(OLDEST) .venv-peers

# What training and measuring have written, with the data that scripts have downloaded or made.
clean-runs:
	rm -rf runs/* runs/.data reports/*

# Every published version, its journal and models.config.
clean-models:
	rm -rf models/* models/.models.config.lock

# The container engine of the tests, 13 GB of packages and images, where no engine was there before.
clean-cache:
	rm -rf "$${SPIKELESS_CACHE:-$${XDG_CACHE_HOME:-$$HOME/.cache}/spikeless}/engine"

# make demo    trains a GPT in two worker processes on this machine
# make test    runs all tests
# make bench   measures against JAX and PyTorch on the same cores

PYTHON ?= python3
VENV := .venv
PLUGIN := .foreshard/plugins/xla_plugins/xla_cpu_pjrt/xla_cpu_pjrt.so
# Rust from rustup may be installed but not on the PATH of a fresh shell.
export PATH := $(PATH):$(HOME)/.cargo/bin

.PHONY: demo build plugin venv test lint bench bundles

demo: build plugin
	target/debug/foreshard local run manifests/charlm.yaml

build:
	cargo build --locked

plugin: $(PLUGIN)
$(PLUGIN): scripts/get-pjrt-cpu.sh
	scripts/get-pjrt-cpu.sh
	touch $@

venv: $(VENV)/.made
$(VENV)/.made: python/requirements-test.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r python/requirements-test.txt
	touch $@

test: plugin venv
	cargo test --locked
	cd python && ../$(VENV)/bin/python -m pytest -q

lint:
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings

bench: plugin venv
	cargo build --locked --release
	$(VENV)/bin/python benches/run.py

bundles: venv
	cd python && ../$(VENV)/bin/python -m models.build ../bundles

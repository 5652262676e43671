# make demo        trains a GPT in two worker processes on this machine
# make demo-recut  the same while other processes compete for a core: the plan follows
# make test        runs all tests
# make soak        tells SOAK stories of recuts, kills, hangs and resumes; the losses must not change
# make e2e         runs jobs in pods of a real Kubernetes on this machine, built once; needs root (e2e/README.md)
# make lint        checks format and clippy's advice
# make bench       measures against JAX and PyTorch on the same cores
# make fuzz        feeds damaged modules, bundles, manifests, problems and frames to their readers, FUZZ_SECONDS for each

PYTHON ?= python3
VENV := .venv
PLUGIN := .foreshard/plugins/xla_plugins/xla_cpu_pjrt/xla_cpu_pjrt.so
# Rust from rustup may be installed but not on the PATH of a fresh shell.
export PATH := $(PATH):$(HOME)/.cargo/bin

.PHONY: demo demo-recut build plugin venv test soak e2e manifests proto lint bench fuzz bundles

demo: build plugin
	target/debug/foreshard local run manifests/charlm.yaml

demo-recut: build plugin
	$(PYTHON) scripts/demo-recut.py

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

SOAK ?= 100
soak: plugin
	FORESHARD_SOAK=$(SOAK) cargo test --locked --test alive -- --nocapture whatever_happens

e2e: build plugin
	e2e/cluster/build helm
	e2e/chart.py
	e2e/cluster/cluster image
	e2e/run.py

# The code of the service between operator and heads, from its .proto.
proto:
	cargo run --quiet --locked --manifest-path proto/Cargo.toml

# The plain install, from the chart.
manifests:
	e2e/cluster/build helm
	scripts/plain-install.sh > manifests/install/foreshard.yaml

lint:
	cargo fmt --check
	cargo fmt --check --manifest-path fuzz/Cargo.toml
	cargo fmt --check --manifest-path proto/Cargo.toml
	cargo clippy --locked --all-targets -- -D warnings

bench: plugin venv
	cargo build --locked --release
	$(VENV)/bin/python benches/run.py

# Needs a nightly toolchain (rustup toolchain install nightly). What it finds lies in fuzz/artifacts.
FUZZ_SECONDS ?= 60
CARGO_FUZZ := .foreshard/tools/bin/cargo-fuzz
$(CARGO_FUZZ):
	cargo install --quiet --locked --root .foreshard/tools --version 0.13.2 cargo-fuzz
fuzz: $(CARGO_FUZZ)
	cargo run --quiet --locked --manifest-path fuzz/Cargo.toml --example seeds -- fuzz/corpus
	for target in import bundle manifest problem wire; do PATH="$(CURDIR)/.foreshard/tools/bin:$$PATH" \
	cargo +nightly fuzz run $$target -- -max_total_time=$(FUZZ_SECONDS) -max_len=65536 -timeout=20 \
	-malloc_limit_mb=1024 -rss_limit_mb=4096 -print_final_stats=1 || exit 1; done

bundles: venv
	cd python && ../$(VENV)/bin/python -m models.build ../bundles

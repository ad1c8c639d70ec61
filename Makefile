# Everything a newcomer needs: `make demo` and `make test`. See README.md.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SITE := $(VENV)/lib/python3.11/site-packages
CONFIG ?= configs/demo.yaml

.PHONY: demo serve test check install lock proto bench-start bench-proxy bench-serving bench-waits bench-tokenise bench-kv bench-overlap bench-plan system-deps wheels clean

demo: install
	$(BIN)/omni_cli demo

serve: install
	$(BIN)/omni_cli serve $(CONFIG)

test: check
	$(BIN)/python -m pytest --cov --cov-report=term

check: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Starts this project's deployments and plain vLLM servers in turn; numbers and what they mean: docs/performance.md.
bench-start: install
	$(BIN)/python -m benchmarks.bench_start

# The proxy beside vllm-router, nginx and no proxy, on instant stand-in engines (about 5 minutes). Compiles with gcc; leaves
# out, and says so, what is not installed (`make system-deps`).
bench-proxy: install
	$(BIN)/python -m benchmarks.bench_proxy --arguments "--min-prefill-tokens 0 --max-active-per-decode 4096"

# Our 1P1D, two plain vLLM servers, and 1P1D with NIXL behind vllm-router under the same chats and long prompts (about 15
# minutes; ARGS=--quick: 4, and of no weight).
bench-serving: install
	$(BIN)/python -m benchmarks.bench_serving $(ARGS)

# vLLM's engines, whose processes wait for one another in a loop, beside ours, which sleep (about 4 minutes; --model tiny for short steps).
bench-waits: install
	$(BIN)/python -m benchmarks.bench_waits

# D gets text or P's token ids, in the forms that the proxy sends: what the api servers and the proxy pay for each (about 5 minutes).
bench-tokenise: install
	$(BIN)/python -m benchmarks.bench_tokenise_once

# Every way of moving KV beside memcpy, raw sockets, NIXL and Mooncake, on the same buffers (about 6 minutes).
bench-kv: install
	$(BIN)/python -m benchmarks.bench_kv

# Pull against layer-wise on a link narrowed to 1 Gbit/s (about 3 minutes). Needs root and iproute2.
bench-overlap: install
	$(BIN)/python -m benchmarks.bench_overlap

# Planning and rendering 144 P and 288 D ranks (seconds).
bench-plan: install
	$(BIN)/python -m benchmarks.bench_plan

# Debian packages beyond Python 3.11 for all of the tests and benchmarks, some of which are skipped without them:
# Mooncake's library, network namespaces to cut links in, and for bench-proxy load, a peer, and a compiler for its stand-in
# engines; sshd for hosts in such namespaces, as the Ansible backend's test has them; libnuma1, which vLLM's CPU library
# loads and few machines lack. Needs root; omni itself needs that last one alone.
SYSTEM_DEPS := libnuma1 libibverbs1 iproute2 iptables openssh-server wrk nginx-light gcc libc6-dev
system-deps:
	@dpkg -s $(SYSTEM_DEPS) >/dev/null 2>&1 || { \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SYSTEM_DEPS); }

install: $(VENV)/.installed

# The lock is complete, so nothing is resolved (--no-deps) and the packages that a CPU torch cannot load stay out.
# Compiled once here, after the download: every engine imports some 6000 modules. (torch ships one file for a newer
# Python, which cannot be compiled; hence the leading dash.)
$(VENV)/.installed: requirements/cpu.lock pyproject.toml
	@$(PYTHON) --version >/dev/null || { echo "Python 3.11 is needed: set PYTHON to its executable"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet 'pip>=25'
	$(BIN)/python -m pip install --quiet --no-compile --no-deps -r requirements/cpu.lock || { \
	  echo "No torch 2.13.0+cpu? On most machines it comes from PyTorch's index of CPU builds:"; \
	  echo "  PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make install"; exit 1; }
	-$(BIN)/python -m compileall -q -j 0 $(SITE) >/dev/null 2>&1
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

# Needs uv. A CPU torch is looked for on the configured indexes and in $$UV_FIND_LINKS.
lock:
	printf '%s\n' '# Made by `make lock` from pyproject.toml: all of the extras cpu and dev, for Python 3.11 on Linux. Install with --no-deps.' > requirements/cpu.lock.new
	uv pip compile pyproject.toml --extra cpu --extra dev --python-version 3.11 --no-header --no-annotate -q >> requirements/cpu.lock.new
	mv requirements/cpu.lock.new requirements/cpu.lock

# Wheels for hosts without a package index, in build/dist.
wheels:
	build/build.sh

# The control plane's messages, after a change of its .proto.
proto: install
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. services/global_proxy/control_plane/control_plane.proto

clean:
	rm -rf $(VENV) logs .pytest_cache .mypy_cache .ruff_cache .coverage

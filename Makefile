# Steadyhelm's commands. `make train` and `make test` set everything up by themselves.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV ?= .venv
PY := $(VENV)/bin/python
BIN := $(VENV)/bin
PYTHON ?= python3.11
export OMP_NUM_THREADS ?= 1
# For a tier whose tests disturb nobody; files stay whole, as what is made once for a file is dear.
SIDE_BY_SIDE ?= --numprocesses 2 --dist loadfile

.PHONY: help setup generate train test test-charts test-cluster test-images test-runs test-store test-engines engines images test-gpu check bench constraints clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort

setup: $(VENV)/.ready ## uv, a virtual environment, every dependency

$(VENV)/.ready: pyproject.toml constraints.txt
	@.ci/setup "$(VENV)" "$(PYTHON)"
	@touch $@

# The cold start is made once for each state of what makes it.
COLD_START = digits-sft-$(shell cat workloads/r1_reward/digits_sft.yaml workloads/r1_reward/*.py | sha256sum | cut -c1-8)

train: setup ## the laptop R1-Reward run: SFT cold start, then StableReinforce (RESUME=1 goes on with the last, ENGINE=vllm or sglang samples with a server)
	@$(if $(filter vllm sglang,$(ENGINE)),.ci/engines $(ENGINE) >/dev/null)
	@$(BIN)/steadyhelm sft workloads/r1_reward/digits_sft.yaml --id $(COLD_START)
	@$(BIN)/steadyhelm run workloads/r1_reward/digits.yaml $(if $(RESUME),--resume-last,--new) \
		--set model.path=runs/$(COLD_START)/model $(if $(ENGINE),--set rollout.engine.type=$(ENGINE))

test: setup ## every test that needs nothing beyond PyPI
	$(BIN)/pytest -m "not charts and not cluster and not engines and not gpu and not images and not runs and not store" tests

test-charts: setup ## the Helm charts, rendered by helm and judged by the schemas of Kubernetes and KubeRay (helm is built by Go where missing)
	@.ci/helm >/dev/null || { echo "make test-charts: nothing was tested" >&2; exit 1; }
	@.ci/crds >/dev/null || true # before the tests, whose time is limited
	$(BIN)/pytest $(SIDE_BY_SIDE) -m charts -rs tests/charts

test-cluster: setup ## the charts on a real Kubernetes: the one that KUBECONFIG names, or one of this machine's own (root, Go and Debian's packages)
	@.ci/helm >/dev/null || { echo "make test-cluster: nothing was tested" >&2; exit 1; }
	@[ -n "$$KUBECONFIG" ] || { .ci/kubernetes && .ci/versitygw && .ci/kwok && .ci/node-images; } >/dev/null || { echo "make test-cluster: nothing was tested" >&2; exit 1; }
	STEADYHELM_KEEP_IMAGES=1 $(BIN)/pytest -m cluster -rs --timeout 1200 tests/cluster $(if $(KUBECONFIG),,tests/operator)

test-images: setup ## the Dockerfiles' pins, by the package index; and the images that run without a GPU, built and run (root, buildah)
	$(BIN)/pytest -m images -rs tests/docker

test-runs: setup ## whole runs over real Ray, killed and resumed
	$(BIN)/pytest -m runs tests

test-store: setup ## the batch plane on a real S3 server (versitygw, built by Go, or STEADYHELM_TEST_S3_ENDPOINT)
	@[ -n "$$STEADYHELM_TEST_S3_ENDPOINT" ] || .ci/versitygw >/dev/null || { echo "make test-store: nothing was tested" >&2; exit 1; }
	$(BIN)/pytest -m store -rs tests

engines: ## the environments of the vLLM and the SGLang server, from PyPI, in the cache; for machines without a GPU
	@.ci/engines vllm
	@.ci/engines sglang

test-engines: setup engines ## engine servers under the suite of all engines
	$(BIN)/pytest -m engines --timeout 900 tests

images: ## container images of every role, with docker or buildah (ROLES="cpu reward" builds those alone)
	@.ci/images $(ROLES)

# $(call repeated,LINES,FILES) fails where files share a block of that many lines, and where symilar does not finish.
define repeated
	@found=$$($(BIN)/symilar --duplicates=$(1) --ignore-docstrings --ignore-comments $(2)) || exit 1; \
		case $$found in *"similar lines in"*) echo "$$found" | grep -A 12 "similar lines in"; exit 1;; *"TOTAL lines="*);; \
		*) echo "symilar gave no result: $$found" >&2; exit 1;; esac
endef

check: setup ## format, lint, types, import contracts, repeated code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(call repeated,12,$$(find $(wildcard system operators workloads benchmarks docs engines) -name '*.py'))
	$(call repeated,12,$$(find tests -name '*.py'))

bench: setup ## every benchmark, quickly
	@set -e; for file in benchmarks/[a-z]*.py; do grep -q __main__ $$file || continue; echo "== $$file"; $(PY) $$file --quick; done

test-gpu: setup ## the tests that need a CUDA device
	$(BIN)/pytest -m gpu tests

PIN = PYTHON="$(PYTHON)" .ci/uv pip compile --python-version 3.11 --no-emit-index-url --no-annotate --no-header --upgrade --quiet
constraints: ## pin every dependency again, ours and those of the engine servers on GPUs
	@$(PIN) pyproject.toml --all-extras -o constraints.txt
	@for engine in vllm sglang; do $(PIN) engines/$$engine.txt engines/plugin/pyproject.toml -o engines/$$engine.constraints.txt || exit 1; done

generate: setup ## write what is generated anew: run file reference, metrics, sizing; the charts' READMEs, schemas, dashboards
	$(PY) docs/reference/generate.py
	$(PY) charts/generate.py

clean: ## remove what the commands made here
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

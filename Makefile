# `make help` lists the targets. Environments are built by tools/setup; nothing here needs root except setup-system.
SHELL := /bin/sh
.DEFAULT_GOAL := help

BIN := .venv/bin
PYTEST := $(BIN)/pytest
# buf keeps a cache, and would otherwise want a home to put it in.
export BUF_CACHE_DIR := $(CURDIR)/.tools/buf-cache

.PHONY: help
help: ## List every target
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## Build .venv, .venv-vllm and .tools, or what of them is out of date (PYTHON=… chooses the Python)
	@python=$$(PYTHON="$(PYTHON)" sh tools/setup/find-python.sh) && exec "$$python" tools/setup

.PHONY: setup-system
setup-system: ## Install the Debian packages that the tests need (root), or name them
	@sh tools/setup/system.sh

.PHONY: quickstart
quickstart: setup ## The main job on this machine: fine-tune, hot-swap, compare; needs no root
	@$(BIN)/finery quickstart

.PHONY: test
test: setup-system setup lint ## Everything that needs no GPU: set-up, lint, all tests
	@$(PYTEST) -m "not gpu" -n 2 --dist loadscope --no-loadscope-reorder $(PYTEST_ARGS)

.PHONY: test-fast
test-fast: setup ## The tests without a GPU that are not slow, end to end left out
	@$(PYTEST) -m "not gpu and not slow" --ignore=tests/e2e --ignore=tests/chaos $(PYTEST_ARGS)

.PHONY: e2e
e2e: setup ## The whole path through the official openai client against the real stack
	@$(PYTEST) tests/e2e -v -m "not gpu" $(PYTEST_ARGS)

.PHONY: chaos
chaos: setup-system setup ## Faults put to the real system, in their long form: kills, damaged adapters, a full disk, 1,000 deployments (half an hour)
	@FINERY_CHAOS=long $(PYTEST) tests/chaos -v $(PYTEST_ARGS)

.PHONY: helm-test
helm-test: setup ## The chart: Helm's lint, every example and switch against Kubernetes' schemas, snapshots (UPDATE=1 writes them anew)
	@FINERY_UPDATE_SNAPSHOTS=$(UPDATE) $(PYTEST) helm/tests $(PYTEST_ARGS)

.PHONY: lint
lint: setup ## ruff, buf, import-linter, pyright
	@echo "ruff check" && $(BIN)/ruff check --quiet --output-format concise .
	@echo "ruff format" && $(BIN)/ruff format --check .
	@echo "buf lint" && $(BIN)/buf lint protos
	@echo "import-linter" && $(BIN)/lint-imports --no-logo
	@echo "pyright" && $(BIN)/basedpyright --warnings

.PHONY: format
format: setup ## Format the code and mend what ruff can
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

.PHONY: protos
protos: setup ## Regenerate the stubs in protos/gen
	@$(BIN)/python tools/protos.py

.PHONY: proto-breaking
proto-breaking: setup ## Compare the protos with those of git's main for breaking changes
	@$(BIN)/buf breaking protos --against '.git#branch=main,subdir=protos'

# Stands where the CUDA build of torch and the peers are; the checkout's packages are found by path.
GPU_PYTHON := python3
GPU_PATH := protos/gen:services/common:services/trainer:kernels

.PHONY: bench-train
bench-train: ## Training steps beside Unsloth, Liger and transformers, on a GPU: ROWS="qlora 2x2048x4,…" MODEL=DIR [ENGINES=…]
	@PYTHONPATH="$(GPU_PATH):$$PYTHONPATH" $(GPU_PYTHON) kernels/benchmarks/train.py bench --rows "$(ROWS)" --model "$(MODEL)" \
		$(if $(ENGINES),--engines "$(ENGINES)") $(BENCH_ARGS)

.PHONY: bench-profile
bench-profile: ## The engine's kernels by time, on a GPU: ROWS="qlora 2x2048x4" MODEL=DIR OUT=FILE
	@PYTHONPATH="$(GPU_PATH):$$PYTHONPATH" $(GPU_PYTHON) kernels/benchmarks/train.py profile --rows "$(ROWS)" --model "$(MODEL)" \
		--out "$(OUT)" $(if $(ENGINES),--engines "$(ENGINES)") $(BENCH_ARGS)

.PHONY: bench-serving
bench-serving: setup ## vLLM straight and through the gateway; FORM=swaps, zipf, hop: the whole system under load. MODEL=DIR [BENCH_ARGS=…], FINERY_VLLM_PYTHON
	@$(if $(FORM),PYTHONPATH="tests:services/gateway/benchmarks:$$PYTHONPATH" $(BIN)/python -m load $(FORM),$(BIN)/python services/gateway/benchmarks/serving.py) --model "$(MODEL)" $(BENCH_ARGS)

.PHONY: bench-cpu
bench-cpu: setup ## LoRA on SmolLM2 on this CPU, beside transformers' Trainer: tokens a second
	@$(BIN)/python kernels/benchmarks/cpu.py $(BENCH_ARGS)

# docker, or buildah with its global options. Base images, by digest where it matters: PYTHON_IMAGE, CUDA_IMAGE, VLLM_IMAGE; docker/README.md.
IMAGE_BUILDER := docker
IMAGES = python=$$(PYTHON="$(PYTHON)" sh tools/setup/find-python.sh) && "$$python" tools/images.py $(1) $(SERVICES) --builder "$(IMAGE_BUILDER)" --registry "$(REGISTRY)" --tag "$(TAG)" \
	$(foreach name,PYTHON_IMAGE CUDA_IMAGE VLLM_IMAGE,$(if $($(name)),--build-arg "$(name)=$($(name))")) $(IMAGE_ARGS)

.PHONY: images
images: ## Build the services' images: [IMAGE_BUILDER=docker|buildah] [REGISTRY=…] [TAG=…] [SERVICES="gateway …"] [PYTHON_IMAGE=…]
	@$(call IMAGES,build)

.PHONY: sbom
sbom: ## What is installed in the built images, as CycloneDX in build/sbom; options as for images
	@$(call IMAGES,sbom)

.PHONY: clean
clean: ## Remove environments, tools and caches; the state of a running system stays
	@rm -rf .venv .venv-vllm .tools .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# finetune-operator: `make help` lists what can be done here.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

CACHE := $(or $(FINETUNE_CACHE),$(if $(XDG_CACHE_HOME),$(XDG_CACHE_HOME)/finetune-operator,$(HOME)/.cache/finetune-operator))
UV := $(or $(shell command -v uv 2>/dev/null),$(CACHE)/uv/bin/uv)
PY := .venv/bin/python
export PYTHONPATH := hack

.PHONY: help
help: ## Show this list
	@awk -F':.*## ' '/^[a-z][a-z0-9-]*:.*## /{printf "  \033[1m%-14s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(CACHE)/uv/bin/uv:
	python3 -m venv $(CACHE)/uv
	$(CACHE)/uv/bin/pip install --quiet uv==0.13.9

.venv/.ready: pyproject.toml uv.lock | $(if $(shell command -v uv 2>/dev/null),,$(CACHE)/uv/bin/uv)
	$(UV) sync --quiet --frozen --all-extras
	@touch $@

.PHONY: venv
venv: .venv/.ready ## Make the Python environment (.venv) from uv.lock

.PHONY: demo
demo: venv ## A throw-away cluster, S3 and Prometheus; the quickstart trained on 2 pods x 2 ranks; what came out
	$(PY) -m demo up

.PHONY: showcase
showcase: venv ## A real run from data to report on 2 pods, with MLflow (about 15 minutes); what there is to see goes to showcase/
	$(PY) -m demo up --file examples/definitions.yaml --keep showcase

.PHONY: demo-down
demo-down: ## Remove what `make demo` or `make showcase` made
	python3 -m demo down

.PHONY: test
test: lint ## Everything: lint, unit, contract, controller, trainer, chart, end to end on real pods
	$(PY) -m pytest tests

.PHONY: test-fast
test-fast: venv ## What needs neither a cluster nor an image
	$(PY) -m pytest tests -m "not cluster and not e2e"

.PHONY: e2e
e2e: venv ## End to end on real pods only
	$(PY) -m pytest tests/e2e

.PHONY: lint
lint: venv ## ruff, mypy, import-linter, generated files
	.venv/bin/ruff format --check operator trainer_image hack tests benchmarks
	.venv/bin/ruff check operator trainer_image hack tests benchmarks
	.venv/bin/mypy
	PYTHONPATH=operator:trainer_image .venv/bin/lint-imports
	$(PY) -m finetune_api.generate --check

.PHONY: format
format: venv ## Format the code
	.venv/bin/ruff format operator trainer_image hack tests benchmarks
	.venv/bin/ruff check --fix operator trainer_image hack tests benchmarks

.PHONY: generate
generate: venv ## Write crds/, the chart's copy and docs/reference.md from finetune_api
	$(PY) -m finetune_api.generate

.PHONY: matrix
matrix: venv ## Run every family x method x strategy with small models, and write docs/families.md (minutes; goes on after a stop)
	PYTHONPATH=operator:trainer_image:hack:tests $(PY) -m trainer.matrix

.PHONY: broken
broken: venv ## Put each of the 28 known bugs back and see its tests fail (a quarter of an hour; BUGS="16 17" for some)
	PYTHONPATH=operator:trainer_image:hack:tests $(PY) -m trainer.broken $(BUGS)

.PHONY: check-dpo
check-dpo: venv ## Compare the loss, rewards and gradients of DPO with TRL's on the same batch
	PYTHONPATH=operator:trainer_image:hack:tests:. $(PY) -m benchmarks.trainer.check_dpo

.PHONY: images
images: venv ## Build the operator and trainer images
	python3 -m images build operator
	python3 -m images build trainer

.PHONY: cluster
cluster: ## A local cluster with S3 and Prometheus, without Docker
	python3 -m localcluster up --addons s3,prometheus

.PHONY: cluster-down
cluster-down: ## Remove the local cluster
	python3 -m localcluster down

.PHONY: bench
bench: venv ## All benchmarks; figures go to benchmarks/results/
	$(PY) benchmarks/operator_latency.py
	$(PY) benchmarks/overhead.py
	PYTHONPATH=operator:trainer_image:hack:. $(PY) benchmarks/data_memory.py

.PHONY: bench-trainer
bench-trainer: venv ## The trainer beside TRL and LLaMA-Factory, about 45 minutes; BENCH="--help" shows what can be chosen
	$(PY) benchmarks/trainer $(BENCH)

# finetune-operator: `make help` lists the targets.
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
venv: .venv/.ready ## Create the Python environment (.venv) from uv.lock

.PHONY: try
try: ## Fine-tune a small model on this machine in a few minutes, without root or a cluster
	@python3 -m tryout $(TRY)

.PHONY: demo
demo: ## Run the quickstart on a throw-away cluster with S3 and Prometheus (2 pods x 2 ranks), and show the result
	@python3 -m demo up

.PHONY: showcase
showcase: ## Run a complete job on 2 pods, with MLflow (about 15 minutes), and save its report and pictures in showcase/
	@python3 -m demo up --file examples/definitions.yaml --keep showcase

.PHONY: demo-down
demo-down: ## Remove the cluster of `make demo` or `make showcase`
	python3 -m demo down

.PHONY: test-packages
test-packages:
	@[ "$$(id -u)" != 0 ] || python3 -m localcluster packages

.PHONY: test
test: lint test-packages ## Run everything: lint, unit, contract, controller, trainer and chart tests, and end-to-end tests on real pods
	$(PY) -m testrun

.PHONY: test-fast
test-fast: venv test-packages ## Run the tests that need neither a cluster nor an image, without the slowest modules
	$(PY) -m testrun -m "not cluster and not e2e and not slow"

.PHONY: e2e
e2e: venv ## Run only the end-to-end tests on real pods
	$(PY) -m pytest tests/e2e tests/nodes

.PHONY: lint
lint: venv ## Run ruff, mypy and import-linter, and check generated files
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

.PHONY: sizing
sizing: venv ## Write docs/sizing.md from the memory estimate
	$(PY) -m sizing

.PHONY: templates
templates: venv ## Write docs/templates.md from the trainer's own rendering
	$(PY) -m templates

.PHONY: matrix
matrix: venv ## Run every family x method x strategy with small models, and write docs/families.md (minutes; resumes if interrupted)
	PYTHONPATH=operator:trainer_image:hack:tests $(PY) -m trainer.support.family_matrix

.PHONY: broken
broken: venv ## Reintroduce each of the 28 known bugs and check that its tests fail (15 minutes; BUGS="16 17" selects)
	PYTHONPATH=operator:trainer_image:hack:tests $(PY) -m trainer.support.mutation_testing $(BUGS)

.PHONY: check-dpo
check-dpo: venv ## Compare the loss, rewards and gradients of DPO with TRL's on the same batch
	PYTHONPATH=operator:trainer_image:hack:tests:. $(PY) -m benchmarks.trainer.check_dpo

.PHONY: images
images: venv ## Build the operator and trainer images
	python3 -m images build operator
	python3 -m images build trainer

.PHONY: push
push: ## Build and push both images, and write values-images.yaml: make push REGISTRY=registry.example.com/team
	@[ -n "$(REGISTRY)" ] || { echo 'make push: REGISTRY is missing; set it to host and path: make push REGISTRY=registry.example.com/team' >&2; exit 2; }
	@python3 -m images push "$(REGISTRY)" $(if $(BASE),--base "$(BASE)")

.PHONY: cluster
cluster: ## Start a local cluster with S3 and Prometheus, without Docker
	python3 -m localcluster up --addons s3,prometheus

.PHONY: cluster-down
cluster-down: ## Remove the local cluster
	python3 -m localcluster down

.PHONY: bench
bench: venv ## Run all benchmarks; the results are written to benchmarks/results/
	$(PY) benchmarks/operator_latency.py
	$(PY) benchmarks/overhead.py
	PYTHONPATH=operator:trainer_image:hack:. $(PY) benchmarks/data_memory.py

.PHONY: bench-trainer
bench-trainer: venv ## Compare the trainer with TRL and LLaMA-Factory (about 45 minutes; BENCH="--help" lists options; BASELINE=REV compares with an earlier revision instead)
	$(PY) benchmarks/trainer$(if $(BASELINE),/baseline.py $(BASELINE)) $(BENCH)

GPU_CHECK = PYTHONPATH=.:operator:trainer_image:tests UV=$(UV) $(PY) -m benchmarks.gpu

.PHONY: gpu-check
gpu-check: venv $(if $(REHEARSE),gpu-carry) ## Test and time this machine's GPU, in minutes (REHEARSE=1 on a CPU; STAGES=a,b BUDGET=SECONDS OUT=DIR)
	$(GPU_CHECK) $(if $(REHEARSE),--rehearse) $(if $(STAGES),--stages $(STAGES)) $(if $(BUDGET),--budget $(BUDGET)) $(if $(OUT),--out $(OUT))

.PHONY: roofline
roofline: venv ## Model how fast an H100 would train, from the kernels that the trainer launches; needs no GPU (a minute; CELLS=a,b)
	PYTHONPATH=.:operator:trainer_image:tests $(PY) -W ignore -m benchmarks.gpu.roofline $(if $(CELLS),--cells $(CELLS))

.PHONY: gpu-carry
gpu-carry: venv ## Collect the wheels that a GPU machine without network lacks in .gpu-carry (with the repository at most 64 MiB)
	$(GPU_CHECK).carry

.PHONY: gpu-references
gpu-references: venv ## Recompute the reference losses for GPU runs (a few minutes; float32 on the CPU)
	$(GPU_CHECK).references

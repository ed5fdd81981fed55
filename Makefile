# One vocabulary for people and for CI. Every recipe runs from this folder with relative paths.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
BIN := .venv/bin
# One process per core, one thread each: whole files, so that what a file's fixtures make is made once.
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo test test-all check format bench docs lock clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' | \
		while IFS='|' read -r name text; do printf '  make %-9s %s\n' "$$name" "$$text"; done

setup: ## Create .venv with the locked packages and the torch build for this machine
	@bash deploy/setup.sh

demo: setup ## Run the whole pipeline on the pocket backbones
	@$(BIN)/llava-pipeline demo

test: setup ## Run the tests, without the slow ones
	@bash deploy/test_data.sh
	@bash deploy/browser.sh
	@bash deploy/test_services.sh
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL)

test-all: setup ## Run every test
	@bash deploy/test_data.sh
	@bash deploy/browser.sh
	@bash deploy/test_services.sh
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m ""

check: setup ## Check format, lint, types and import contracts
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy llava_pipeline flows
	@$(BIN)/lint-imports --no-logo

format: setup ## Format the code and apply the safe lint fixes
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

bench: setup ## Run the benchmarks
	@$(BIN)/python -m benchmarks

docs: setup ## Check the links, anchors and commands in the Markdown files
	@$(BIN)/python deploy/check_docs.py

# Torch, Triton and CUDA packages stay out: deploy/setup.sh chooses the build. Two passes, because the first one
# finds the names of the CUDA packages of the pinned torch. Pins are kept; UPGRADE=1 takes the newest releases.
lock: setup ## Rewrite requirements.lock (UPGRADE=1 for the newest releases)
	@torch=$$(sed -n 's/^TORCH_VERSION=//p' deploy/setup.sh); \
	work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; \
	echo "torch==$$torch" >"$$work/torch.txt"; \
	cp requirements.lock "$$work/all.txt"; \
	compile=($(BIN)/uv pip compile pyproject.toml --quiet --extra dev --universal --python-version 3.11 \
		--constraint "$$work/torch.txt" --no-annotate $(if $(UPGRADE),--upgrade)); \
	"$${compile[@]}" --output-file "$$work/all.txt"; \
	omit=(); while read -r name; do omit+=(--no-emit-package "$$name"); done \
		< <(grep -oE '^(torch|triton|(nvidia|cuda)-[a-z0-9-]+)' "$$work/all.txt" | sort -u); \
	"$${compile[@]}" --generate-hashes "$${omit[@]}" --custom-compile-command "make lock" --output-file requirements.lock; \
	echo "requirements.lock: $$(grep -cE '^[a-z0-9].*==' requirements.lock) packages"

clean: ## Remove caches and build output (keeps .venv and results)
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis ./*.egg-info
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The Python that .venv is made with, 3.10 or newer: make setup PYTHON=python3.12
PYTHON ?= python3

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.DEFAULT_GOAL := help
.PHONY: help setup train test test-all fuzz lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

setup: .venv/installed ## create .venv with torch, Detectron2 0.6, this package and its tools
	@echo "Ready: .venv"

DEMO := output/digits_easy
train: export DETECTRON2_DATASETS = datasets
train: .venv/installed ## train a small digit detector, or finish its training, and draw its detections
	@$(BIN)/python train_net.py --resume \
		--config-file configs/DigitsEasy/pisa_faster_rcnn_R_18_FPN.yaml OUTPUT_DIR $(DEMO)
	@$(BIN)/python projects/ShowDetections/show_detections.py $(DEMO)
	@echo
	@echo "This is a Faster R-CNN with PISA, trained from scratch on digits drawn on photographs and"
	@echo "evaluated on new ones. Look at $(DEMO)/detections.png: ground truth on the left, detections"
	@echo "on the right. Next, find out which strategy pays on this detector:"
	@echo
	@echo "  $(BIN)/python projects/HeadStudy/study.py --config-file $(DEMO)/config.yaml \\"
	@echo "      --processes 2 MODEL.WEIGHTS $(DEMO)/model_final.pth"
	@echo
	@echo "To train on your own data, see README.md."

test: lint ## lint, then run the tests: 4 minutes on two cores
	$(BIN)/pytest

test-all: lint ## lint, then run all tests, including the slow ones
	$(BIN)/pytest -m 'not by_hand'

# The number of cases per test, and the seed, with which a run can be repeated.
FUZZ_EXAMPLES ?= 20000
SEED ?= 0
fuzz: export HYPOTHESIS_PROFILE = fuzz
fuzz: export FUZZ_EXAMPLES := $(FUZZ_EXAMPLES)
fuzz: .venv/installed ## test on random input (FUZZ_EXAMPLES=20000 per test, SEED=0): some minutes
	$(BIN)/pytest tests/test_fuzz.py --hypothesis-seed=$(SEED) --hypothesis-show-statistics

lint: .venv/installed ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy pisa_d2 train_net.py
	@# One by one, since each has a train_net.py.
	@for project in $(wildcard projects/*/); do \
		echo "$(BIN)/mypy $$project"; $(BIN)/mypy $$project || exit 1; \
	done

format: .venv/installed ## fix style and format automatically
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove caches and build products (keeps .venv, datasets and output)
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# Each file is written last in its recipe, so the next call resumes an interrupted set-up.

# pip 26.3 and newer refuse pb1-detectron2.
.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo >&2 \
		"$(PYTHON) is not Python 3.10 or newer. Name one that is: make setup PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo >&2 \
		"$(PYTHON) cannot create virtual environments. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Creating .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@$(PIP) 'pip>=24,<26.3'
	@touch $@

# pb1-detectron2 holds the Python files of Detectron2 0.6 without the C++ sources, so it needs no
# compiler; its set-up script imports torch. Its own pins are stale, hence --no-deps and no warnings
# about them; setup.py lists versions that work.
.venv/installed: .venv/created setup.py Makefile
	@echo "Installing torch and torchvision (2 to 3 GB, some minutes)"
	@$(PIP) 'setuptools<81' wheel torch==2.14.1 torchvision==0.29.1
	@echo "Installing Detectron2 0.6"
	@$(PIP) --use-pep517 --no-build-isolation --no-deps \
		--config-settings=--global-option=build_py --config-settings=--build-option=--skip-build \
		pb1-detectron2==0.6
	@echo "Installing pisa_d2, what it needs and its tools"
	@$(PIP) --no-build-isolation --no-warn-conflicts --editable '.[detectron2-deps,digits,projects,dev]'
	@touch $@

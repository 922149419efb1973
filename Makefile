# make demo   the main job: docstrings (or TEXT='a.txt b.jsonl.zst') -> pretrained BERT and GPT -> fine-tuned classifier
# make test   linters, types and the whole test suite, with real 2-process ZeRO-3 runs
# make quick  the part of the tests that takes three minutes
# make venv   only the environment
# make sbom   the bill of materials of the environment, sbom.json (CycloneDX)
# make audit  asks a database of known vulnerabilities about every pinned package; needs the network

SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# On a machine without a GPU, and where pip's default torch is the CUDA build, name PyTorch's own CPU index:
#   make venv TORCH_PIP_ARGS='--index-url URL'
TORCH_PIP_ARGS ?=
BIN := .venv/bin

.PHONY: demo test quick lint venv sbom audit clean

demo: venv
	$(BIN)/python -m launcher.demo $(TEXT)

# Two files at a time: many tests wait for a stall, a server or a start; more at once would disturb what they time.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

quick: venv
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not distributed"

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

venv: .venv/done

# In an environment of their own: what looks at the packages must not be one of them.
.audit/done:
	$(PYTHON) -m venv .audit
	.audit/bin/pip install -q cyclonedx-bom pip-audit
	touch $@

sbom: venv .audit/done
	.audit/bin/cyclonedx-py environment .venv --output-reproducible -o sbom.json

audit: .audit/done
	.audit/bin/pip-audit --no-deps -r constraints.txt

# torch first, exactly pinned: anything that merely asks for torch would pull a CUDA build of gigabytes. Then deepspeed
# without its ahead-of-time kernels: its setup needs the installed torch, so without build isolation.
.venv/done: setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "millstream needs Python >= 3.11; none found (set PYTHON=/path/to/python3)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "venv is missing: apt-get install python3-venv"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt pip setuptools wheel ninja packaging py-cpuinfo
	$(BIN)/pip install -q -c constraints.txt $(TORCH_PIP_ARGS) torch==2.13.0
	DS_BUILD_OPS=0 $(BIN)/pip install -q -c constraints.txt --no-build-isolation deepspeed==0.19.8
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,bench,s3,datatrove,harness]'
	touch $@

clean:
	rm -rf .venv .audit sbom.json build *.egg-info .mypy_cache .ruff_cache .pytest_cache

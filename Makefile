.PHONY: help install test test-more test-all coverage test-gpu golden golden-kernels compile-report mutants fuzz \
	lint format bench bench-smoke api

help:            ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

install:         ## editable install with everything that tests need
	pip install -e ".[test]"

# One thread for each of the processes that run tests, and for those that tests start.
PYTEST = OMP_NUM_THREADS=1 python -m pytest -n auto --dist loadscope

test:            ## the tests that need no GPU, but for further cases
	$(PYTEST) -m "not gpu and not more"

test-more:       ## the further cases: random and interpreted ones, export by compilers, the tests' own machinery
	$(PYTEST) -m "more and not gpu"

test-all: test test-more  ## all tests that need no GPU

coverage:        ## how much of segmenter/ the tests run, at least 90 %; tracing makes them much slower
	$(PYTEST) -m "not gpu" --ignore=tests/kernels --cov --cov-report=term --cov-fail-under=90

test-gpu:        ## the tests that need a GPU
	python -m pytest -m gpu

golden:          ## the stand-alone checker on the golden cases
	python tests/golden/check.py tests/golden --adapter tests/golden_adapter.py --quiet

golden-kernels:  ## the same through the Triton kernels, in Triton's interpreter
	PYTHONPATH=. TRITON_INTERPRET=1 GOLDEN_IMPL=triton python tests/golden/check.py tests/golden \
		--adapter tests/golden_adapter.py --quiet

compile-report:  ## every kernel compiled for every architecture, without a GPU: registers, spills, tensor cores
	python -m bench.compile_report

mutants:         ## plants every bug of tests/mutants and sees that the tests find it (half an hour)
	python -m tests.mutants

fuzz:            ## 5,000 mutated files of every format that is read, and a table of how they ended (an hour)
	python -m tests.fuzz --files 5000

lint:            ## ruff: rules and format, nothing is changed
	ruff check .
	ruff format --check .

format:          ## ruff: fix and format
	ruff check --fix .
	ruff format .

bench:           ## the core sweep on this machine; see bench/conftest.py for the options
	python -m pytest bench --results bench/results

bench-smoke:     ## every kind of benchmark once on tiny inputs, checked and not timed; of torch.compile one row
	python -m pytest bench --benchmark-disable -q -k "(not compile and not noise) or mlp"

api:             ## API pages from the docstrings, as HTML in out/api; needs pip install -e ".[docs]"
	python docs/make_api.py out/api

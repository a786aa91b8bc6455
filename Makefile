# Every target builds .venv by itself: Python >= 3.11 and pip are all it takes.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.cpp csrc/*.h)

.PHONY: run setup test test-gpu sanitize fuzz lint bench bench-gpu wheel clean

run: .venv/.demo
	$(BIN)/fibecfed run $(ARGS)

setup: .venv/.demo

test: .venv/.demo .venv/.dev
	$(BIN)/python -m pytest $(ARGS)

test-gpu: .venv/.demo .venv/.dev
	$(BIN)/python -m pytest -m gpu $(ARGS)

# the kernels' tests on an extension that checks every address and every undefined operation (gcc's ASan and UBSan); a
# report ends the run, and is printed only because pytest leaves file descriptor 2 alone
SANITIZE := -fsanitize=address,undefined
sanitize: .venv/.dev
	CFLAGS="$(SANITIZE) -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1" LDFLAGS="$(SANITIZE)" \
		$(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so):$$(c++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		PYTHONPATH=build/sanitize/lib $(BIN)/python -m pytest --capture=sys \
		$$(ls tests/kernels/test_*.py | grep -v 'triton\|gpu') $(ARGS)

# libFuzzer on the reader of messages and on the wire's C++ loops, SECONDS on each; what it finds it leaves in build/fuzz,
# what it learned in build/fuzz/corpus. g++ has no libFuzzer of its own: it is given the engine that atheris brings
SECONDS ?= 300
FUZZ := -max_total_time=$(SECONDS) -max_len=8192 -len_control=0 -artifact_prefix=build/fuzz/ -print_final_stats=1
FUZZ_CXX := -std=c++20 -O1 -g -Wall -ffp-contract=off $(SANITIZE) -fno-sanitize-recover=all
fuzz: .venv/.dev .venv/.fuzz build/fuzz/decoder
	$(BIN)/python -m fuzz.seeds build/fuzz/seeds
	mkdir -p build/fuzz/corpus/unpack build/fuzz/corpus/decoder
	OMP_NUM_THREADS=1 $(BIN)/python -m fuzz.unpack $(FUZZ) build/fuzz/corpus/unpack build/fuzz/seeds/unpack
	build/fuzz/decoder $(FUZZ) build/fuzz/corpus/decoder build/fuzz/seeds/decoder

build/fuzz/decoder: .venv/.fuzz $(wildcard fuzz/*.cpp csrc/wire_*.h)
	mkdir -p build/fuzz
ifneq ($(shell command -v clang++),)
	clang++ $(FUZZ_CXX) -fsanitize=fuzzer fuzz/decoder.cpp -o $@
else
	g++ $(FUZZ_CXX) -fsanitize-coverage=trace-pc,trace-cmp -c fuzz/decoder.cpp -o $@.o
	g++ -std=c++20 -O2 -Wall -c fuzz/gcc.cpp -o build/fuzz/gcc.o
	g++ $(FUZZ_CXX) -Wl,--wrap=__sanitizer_cov_trace_pc $@.o build/fuzz/gcc.o \
		.venv/lib/python*/site-packages/libclang_rt.fuzzer_no_main.a -lpthread -o $@
endif

# mypy does not follow editable installs that rename a folder: it finds kernels/ under its installed name through a link
lint: .venv/.dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	mkdir -p build/mypy && ln -sfn ../../kernels build/mypy/fibecfed_kernels
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

# rows go to benchmarks/results/results.csv; ARGS="--shapes all" measures every shape
bench: .venv/.dev .venv/.bench
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds --on cpu $(ARGS)
	$(BIN)/python -m benchmarks.plot

bench-gpu: .venv/.dev .venv/.bench
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds --on cuda $(ARGS)
	$(BIN)/python -m benchmarks.plot

wheel: .venv/.installed
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w dist .

# torch comes first and from the constraints: the extension compiles against it, and an open range would fetch CUDA wheels
.venv/.installed: $(SOURCES)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fibecfed needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch triton setuptools wheel ninja
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e .
	touch $@

.venv/.demo: .venv/.installed requirements-demo.txt
	$(BIN)/pip install -q --no-deps -r requirements-demo.txt
	touch $@

.venv/.dev: .venv/.installed requirements-test.txt
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	$(BIN)/pip install -q --no-deps -r requirements-test.txt
	touch $@

.venv/.bench: .venv/.installed requirements-bench.txt
	$(BIN)/pip install -q --no-deps -r requirements-bench.txt
	touch $@

.venv/.fuzz: .venv/.installed requirements-fuzz.txt
	$(BIN)/pip install -q --no-deps -r requirements-fuzz.txt
	touch $@

clean:
	rm -rf .venv build dist *.egg-info kernels/_C*.so

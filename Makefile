# Two commands for a fresh machine with Python 3.11, pip and make:
#   make demo   environment, install, the main job on the embedded default
#   make test   environment, install, all tests
# The environment lives in .venv and is reused until pyproject.toml or constraints.txt change.

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOG := .install.log
TEST_ARGS ?=
# Files of tests run side by side; more processes need more memory, some 3 GB each.
TEST_PROCESSES ?= 2
# Threads that wait by spinning take the cores from the other process; the numbers are the same.
test exhaustive: export OMP_WAIT_POLICY ?= PASSIVE
OPENVINO := .openvino
OPENVINO_STAMP := $(OPENVINO)/.installed
ZOO := .venv-zoo
ZOO_STAMP := $(ZOO)/.installed
ZOO_LOG := .install-zoo.log
COVERAGE_ARGS ?=
FAULTS_ARGS ?=
SOAK_ARGS ?=
FUZZ_ARGS ?=

INSTALL = $(BIN)/python -m pip install --upgrade "pip>=25.1" && \
	$(BIN)/python -m pip install -c constraints.txt -e ".[all]" --group test --group lint --group docs
# HASHES=1, as the gate has it: the files of requirements-ci.txt and no others.
# Python compiles what is imported, when it is imported: the rest would take a minute.
INSTALL_HASHED = $(BIN)/python -m pip install --no-compile --require-hashes --only-binary :all: --no-deps \
	-r requirements-ci.txt && \
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e . && \
	$(BIN)/python -m pip check

export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true

.PHONY: install demo test exhaustive test-scale faults fuzz soak supply audit check docs screenshots bench coverage clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "onnxport: installing into $(VENV) ..."
	@start=$$(date +%s); \
	 { $(PYTHON) -m venv $(VENV) && \
	   $(if $(HASHES),$(INSTALL_HASHED),$(INSTALL)); \
	 } > $(LOG) 2>&1 || { tail -30 $(LOG); exit 1; }; \
	 touch $(STAMP); \
	 echo "onnxport: environment in $(VENV), log in $(LOG), took $$(( $$(date +%s) - start )) s"

demo: $(STAMP)
	@start=$$(date +%s); $(BIN)/python examples/digits.py && \
	 echo "onnxport: make demo took $$(( $$(date +%s) - start )) s"

test: $(STAMP) $(OPENVINO_STAMP)
	@start=$$(date +%s); $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(TEST_ARGS) && \
	 echo "onnxport: tests in tests/, make test took $$(( $$(date +%s) - start )) s"

# Another ONNX Runtime of the same module name, in a folder that some tests put before the first.
# There is none for some platforms, where these tests are skipped.
$(OPENVINO_STAMP): requirements-openvino.txt | $(STAMP)
	@rm -rf $(OPENVINO) && mkdir $(OPENVINO); \
	 start=$$(date +%s); \
	 if $(BIN)/python -m pip install --require-hashes --only-binary :all: --no-deps \
	      --target $(OPENVINO)/site -r requirements-openvino.txt > $(OPENVINO)/log 2>&1; then \
	   touch $(OPENVINO_STAMP); \
	   echo "onnxport: OpenVINO in $(OPENVINO), took $$(( $$(date +%s) - start )) s"; \
	 elif [ -n "$$ONNXPORT_REQUIRE_OPENVINO" ]; then tail -30 $(OPENVINO)/log; exit 1; \
	 else echo "onnxport: no OpenVINO for this machine, see $(OPENVINO)/log; no tests with it"; fi

exhaustive: $(STAMP)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder -m exhaustive $(TEST_ARGS)

test-scale: $(STAMP)
	@$(BIN)/python -m pip install -q --no-build-isolation -c constraints.txt --group scale >> $(LOG) 2>&1 || { tail -30 $(LOG); exit 1; }
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest tests/integration/test_spark.py tests/integration/test_ray.py tests/distributed/test_deepspeed.py tests/distributed/test_ray_train.py tests/integration/test_remote.py

faults: $(STAMP)
	$(BIN)/python benchmarks/faults.py $(FAULTS_ARGS)

soak: $(STAMP)
	$(BIN)/python benchmarks/soak.py $(SOAK_ARGS)

supply: $(STAMP)
	$(BIN)/python benchmarks/supply.py

# bandit must find nothing; pip-audit asks a database of advisories, and says if it cannot.
audit: $(STAMP)
	@$(BIN)/python -m pip install -q -c constraints.txt --group audit >> $(LOG) 2>&1 || { tail -30 $(LOG); exit 1; }
	$(BIN)/bandit -q -c pyproject.toml -r src
	$(BIN)/pip-audit -r requirements-ci.txt -r requirements-openvino.txt --no-deps --disable-pip

fuzz: $(STAMP)
	@$(BIN)/python -m pip install -q -c constraints.txt --group fuzz >> $(LOG) 2>&1 || { tail -30 $(LOG); exit 1; }
	$(BIN)/python benchmarks/fuzz.py $(FUZZ_ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache > .imports.log 2>&1 || { cat .imports.log; exit 1; }

# The site, in docs/_build/html; a warning (a broken link, an unknown name) is an error.
docs: $(STAMP)
	@start=$$(date +%s); $(BIN)/python -m sphinx -b html -n -W --keep-going -q docs docs/_build/html && \
	 echo "onnxport: docs/_build/html/index.html, make docs took $$(( $$(date +%s) - start )) s"

screenshots: $(STAMP)
	$(BIN)/python docs/screenshots.py

bench: $(STAMP)
	$(BIN)/python benchmarks/baseline.py

# torchvision imports beside the CPU build of torch only with what the .pth file loads.
$(ZOO_STAMP): pyproject.toml constraints.txt benchmarks/zoo/requirements.txt \
              benchmarks/zoo/torchvision_operators.py
	@echo "onnxport: installing into $(ZOO) ..."
	@start=$$(date +%s); \
	 { $(PYTHON) -m venv $(ZOO) && \
	   $(ZOO)/bin/python -m pip install --upgrade "pip>=25.1" && \
	   $(ZOO)/bin/python -m pip install -c constraints.txt -e ".[all]" --group test && \
	   $(ZOO)/bin/python -m pip install --no-deps -r benchmarks/zoo/requirements.txt && \
	   site=$$($(ZOO)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
	   cp benchmarks/zoo/torchvision_operators.py "$$site" && \
	   echo "import torchvision_operators" > "$$site/torchvision_operators.pth"; \
	 } > $(ZOO_LOG) 2>&1 || { tail -30 $(ZOO_LOG); exit 1; }; \
	 touch $(ZOO_STAMP); \
	 echo "onnxport: environment in $(ZOO), log in $(ZOO_LOG), took $$(( $$(date +%s) - start )) s"

coverage: $(ZOO_STAMP)
	$(ZOO)/bin/python benchmarks/coverage.py $(COVERAGE_ARGS)

clean:
	rm -rf $(VENV) $(ZOO) $(OPENVINO) docs/_build runs $(LOG) $(ZOO_LOG) .imports.log

# Every target installs what it needs on first use, into .venv/ beside this file, and does nothing
# when nothing changed. All paths are relative: make splits names at spaces, and the folder that
# holds the repository may have some.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

# The interpreter that a new .venv is made from.
PYTHON ?= python3
# A second environment: make test VENV=.venv-3.13 PYTHON=python3.13
VENV ?= .venv
RECIPE =
CONFIG =
ARGS =
NPROC = 1
PACKAGE =

PACKAGES := shared_utils e2vpt dnc yolop_mtl
TOOLS := pytest ruff mypy check-jsonschema pre-commit pre-commit-hooks
WORKFLOWS := .github/workflows/ci.yml .github/workflows/gpu.yml

BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps

ifneq ($(filter-out $(PACKAGES),$(PACKAGE)),)
$(error PACKAGE: got $(PACKAGE), expected one of $(PACKAGES); do make TARGET PACKAGE=e2vpt)
endif

## commands -----------------------------------------------------------------------------------

.PHONY: help
help: ## this list (also: make)
	@echo '  targets'
	@awk 'BEGIN {FS = ":[^#]*## "} /^[a-z][a-zA-Z0-9_ -]*:[^#]*## / { \
		n = split($$1, names, " "); \
		for (i = 1; i <= n; i++) printf i < n ? "  %s\n" : "  %-18s %s\n", names[i], $$2}' Makefile
	@echo
	@echo '  variables'
	@echo '  RECIPE=NAME        another job for a train target; .venv/bin/e2vpt train --help lists them'
	@echo '                     (dnc and yolop-mtl: the same)'
	@echo '  CONFIG=FILE        another config for train-dnc-seg; dnc/configs/ holds them'
	@echo '  ARGS="..."         more options for the command or for pytest: ARGS="--optim.lr 0.5"'
	@echo '  NPROC=N            that many training processes, with torchrun (default 1)'
	@echo '  PACKAGE=NAME       test-slow and test-gpu for one of: $(PACKAGES)'
	@echo '  TORCH_SPEC="..."   another torch and torchvision, kept until another is given;'
	@echo '                     CPU only: TORCH_SPEC="pinned --torch-backend=cpu";'
	@echo '                     TORCH_SPEC=pinned goes back to the pair of constraints.txt'
	@echo '  PYTHON=PROGRAM     Python 3.11 or newer that a new .venv is made from (default python3);'
	@echo '                     a second environment: VENV=.venv-3.13 PYTHON=python3.13'

.PHONY: train-e2vpt
train-e2vpt: $(STAMPS)/e2vpt ## tune a pretrained vision transformer with E2VPT, recipe digits
ifeq ($(NPROC),1)
	$(BIN)/e2vpt train $(or $(RECIPE),digits) $(ARGS)
else
	$(BIN)/python -m torch.distributed.run --standalone --nproc-per-node=$(NPROC) \
		-m e2vpt train $(or $(RECIPE),digits) $(ARGS)
endif

.PHONY: train-dnc-cls
train-dnc-cls: $(STAMPS)/dnc ## train under a classifier without parameters, recipe digits
ifeq ($(NPROC),1)
	$(BIN)/dnc train $(or $(RECIPE),digits) $(ARGS)
else
	$(BIN)/python -m torch.distributed.run --standalone --nproc-per-node=$(NPROC) \
		-m dnc train $(or $(RECIPE),digits) $(ARGS)
endif

.PHONY: train-dnc-seg
train-dnc-seg: $(STAMPS)/dnc ## train a decoder without a classifier's weights, in mmsegmentation
ifeq ($(NPROC),1)
	$(BIN)/dnc seg train "$(or $(CONFIG),dnc/configs/digitscenes_fcn.py)" $(ARGS)
else
	$(BIN)/python -m torch.distributed.run --standalone --nproc-per-node=$(NPROC) \
		-m dnc seg train "$(or $(CONFIG),dnc/configs/digitscenes_fcn.py)" $(ARGS)
endif

.PHONY: train-drive
train-drive: $(STAMPS)/yolop_mtl ## train boxes, drivable area and lanes in one network, recipe synthetic
ifeq ($(NPROC),1)
	$(BIN)/yolop-mtl train $(or $(RECIPE),synthetic) $(ARGS)
else
	$(BIN)/python -m torch.distributed.run --standalone --nproc-per-node=$(NPROC) \
		-m yolop_mtl train $(or $(RECIPE),synthetic) $(ARGS)
endif

.PHONY: bench bench-e2vpt bench-dnc bench-drive
bench: bench-e2vpt bench-dnc bench-drive ## all benchmarks; each writes bench/NAME.json and prints its table
bench-e2vpt: $(STAMPS)/e2vpt ## E2VPT against full fine-tuning and the plain backbone
	$(BIN)/e2vpt bench $(ARGS)
bench-dnc: $(STAMPS)/dnc ## DNC against softmax and a loop over classes
	$(BIN)/dnc bench --segmentation $(ARGS)
bench-drive: $(STAMPS)/yolop_mtl ## YOLOPv2's latency, share of the machine's peak, prediction, loading
	$(BIN)/yolop-mtl benchmark $(ARGS)

## tests and checks ---------------------------------------------------------------------------

# A pytest process per package, so that this gives what the single targets give.
TEST_TARGETS := $(PACKAGES:%=test-%)
.PHONY: test $(TEST_TARGETS)
test: $(TEST_TARGETS) ## all tests: CPU, offline
test-shared_utils test-e2vpt test-dnc test-yolop_mtl: ## one package
$(TEST_TARGETS): test-%: $(STAMPS)/% $(STAMPS)/tools
	$(BIN)/pytest $* $(ARGS)

# The compiled mmcv takes the place of mmcv-lite, in the same folder: an environment of its own.
MMDET_VENV := .venv-mmdet
.PHONY: test-mmdet
test-mmdet: install-mmdet ## the detection plug-in of dnc, with compiled mmcv and mmdet
	$(MMDET_VENV)/bin/pytest dnc/tests_mmdet $(ARGS)

SELECTED := $(or $(strip $(PACKAGE)),$(PACKAGES))
SELECTED_STAMPS := $(SELECTED:%=$(STAMPS)/%)

# Runs the tests with one marker, package by package. pytest leaves with 5 where nothing was
# selected: said aloud, and accepted for a package named with PACKAGE= or beside one that ran;
# a whole run without a single test is a failure.
define run_marked
@status=0; ran=no; \
for package in $(SELECTED); do \
	echo "$(BIN)/pytest $$package -m '$(1)' $(ARGS)"; \
	code=0; $(BIN)/pytest $$package -m '$(1)' $(ARGS) || code=$$?; \
	case $$code in \
		0) ran=yes ;; \
		5) echo "$$package: no test was selected by -m '$(1)' $(ARGS)" ;; \
		*) ran=yes; status=1 ;; \
	esac; \
done; \
if [ $$ran = no ] && [ -z '$(strip $(PACKAGE))' ]; then \
	echo "error: tests: got none for -m '$(1)' in any package, expected at least one" >&2; \
	status=1; \
fi; \
exit $$status
endef

.PHONY: test-slow test-gpu
test-slow: $(SELECTED_STAMPS) $(STAMPS)/tools ## tests marked slow
	$(call run_marked,slow and not gpu)
test-gpu: $(SELECTED_STAMPS) $(STAMPS)/torch $(STAMPS)/tools ## tests marked gpu; fails without a GPU
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else \
	"error: GPU: got none that torch " + torch.__version__ + " can use, expected at least one; " \
	"do run on a machine with an NVIDIA GPU, its driver and a CUDA build of torch")'
	$(call run_marked,gpu)

.PHONY: lint format
lint: $(PACKAGES:%=$(STAMPS)/%) $(STAMPS)/tools ## ruff, mypy, schemas of the workflows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows $(WORKFLOWS)
	$(BIN)/check-jsonschema --builtin-schema custom.github-workflows-require-timeout $(WORKFLOWS)
	$(BIN)/pre-commit validate-config .pre-commit-config.yaml
format: $(STAMPS)/tools ## sort imports, ruff format
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

## installation -------------------------------------------------------------------------------
# One stamp file per step in .venv/stamps. uv takes a lock on .venv, so steps may run side by side.

.PHONY: install
install: $(PACKAGES:%=$(STAMPS)/%) $(STAMPS)/tools ## all packages and tools into .venv, without running anything
	@echo 'installed in $(VENV): $(PACKAGES)'

.PHONY: install-mmdet
install-mmdet: ## dnc with compiled mmcv and mmdet into .venv-mmdet; the first build takes 8 to 30 minutes
	@+$(MAKE) --no-print-directory VENV=$(MMDET_VENV) $(MMDET_VENV)/stamps/mmdet

.PHONY: FORCE
FORCE:

# Scripts and editable installs hold absolute paths. A copied or moved checkout would go on running
# the code of the old place, so the stamp holds the place and another place gets a new .venv.
$(STAMPS)/venv: FORCE
	@here=$$(pwd -P); clear=; \
	if [ -f $@ ]; then \
		if [ "$$(cat $@)" = "$$here" ] && $(BIN)/python -c '' 2>/dev/null; then exit 0; fi; \
		clear=--clear; \
	fi; \
	if ! "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		echo "error: PYTHON: got $(PYTHON) ($$("$(PYTHON)" --version 2>&1 | head -n 1))," \
			"expected Python 3.11 or newer; do make PYTHON=/path/to/newer/python3" >&2; \
		exit 1; \
	fi; \
	echo "==> creating $(VENV) with $$("$(PYTHON)" --version)"; \
	if ! "$(PYTHON)" -m venv $$clear $(VENV); then \
		echo "error: PYTHON: got $(PYTHON) that cannot make $(VENV) (see above)," \
			"expected one with venv; do install it (Debian: apt install python3-venv)" >&2; \
		exit 1; \
	fi; \
	mkdir -p $(STAMPS) && printf '%s\n' "$$here" > $@

$(STAMPS)/uv: constraints.txt $(STAMPS)/venv
	@echo '==> installing uv'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	@touch $@

UV_INSTALL = $(BIN)/uv pip install --python $(BIN)/python --build-constraints constraints.txt

# torch and torchvision must be built for the same device: a CPU torch with a CUDA torchvision fails
# on import. So both go into one uv command, the pair is imported once, and what was installed
# replaces the pins of constraints.txt in $(TORCH_CONSTRAINTS), which every later step keeps to.
# The stamp holds the TORCH_SPEC it was made with; where none is given, that one stays. A change must
# be a reinstall: 2.13.0+cpu, once there, also satisfies torch==2.13.0.
TORCH_CONSTRAINTS := $(STAMPS)/constraints.txt
PINNED_TORCH := $(shell sed -n -E '/^(torch|torchvision)==/p' constraints.txt)
ifeq ($(strip $(TORCH_SPEC)),)
TORCH_CHOICE := $(or $(strip $(shell cat $(STAMPS)/torch 2>/dev/null)),pinned)
else
TORCH_CHOICE := $(strip $(TORCH_SPEC))
endif

$(STAMPS)/torch-choice: FORCE $(STAMPS)/venv
	@[ "$$(cat $@ 2>/dev/null)" = '$(TORCH_CHOICE)' ] || printf '%s\n' '$(TORCH_CHOICE)' > $@

# In single quotes and then as a variable: < and > of a version must not become redirections.
$(STAMPS)/torch: constraints.txt $(STAMPS)/torch-choice $(STAMPS)/uv
	@set -f; words='$(patsubst pinned,$(PINNED_TORCH),$(TORCH_CHOICE))'; reinstall=; \
	if [ "$$(cat $@ 2>/dev/null || echo pinned)" != '$(TORCH_CHOICE)' ] || [ -f $@-unfinished ]; then \
		reinstall='--reinstall-package torch --reinstall-package torchvision'; \
	fi; \
	echo "==> installing $$words"; touch $@-unfinished; \
	sed -E '/^(torch|torchvision)==/d' constraints.txt > $(TORCH_CONSTRAINTS); \
	$(UV_INSTALL) --constraint $(TORCH_CONSTRAINTS) $$reinstall $$words
	@$(BIN)/python -c 'from importlib.metadata import version; \
	[print(name + "==" + version(name)) for name in ("torch", "torchvision")]' >> $(TORCH_CONSTRAINTS)
	@$(BIN)/python -c 'import torchvision' || { \
		echo "error: TORCH_SPEC: got a torch and a torchvision that do not load together (see above)," \
			"expected a pair for the same device;" \
			"do name both, as make help shows, or remove $(VENV)" >&2; \
		exit 1; \
	}
	@rm $@-unfinished; cp $(STAMPS)/torch-choice $@

$(STAMPS)/shared_utils: shared_utils/pyproject.toml $(STAMPS)/torch
	@echo '==> installing shared_utils'
	@$(UV_INSTALL) --constraint $(TORCH_CONSTRAINTS) --editable ./shared_utils
	@touch $@

$(STAMPS)/e2vpt: e2vpt/pyproject.toml $(STAMPS)/shared_utils
	@echo '==> installing e2vpt'
	@$(UV_INSTALL) --constraint $(TORCH_CONSTRAINTS) --editable ./shared_utils --editable ./e2vpt
	@touch $@

# trackers, as mmengine below, asks for opencv-python, which needs libraries of a desktop; the same
# module without windows takes its place.
NO_DESKTOP = echo "opencv-python; python_version < '3'" > $(STAMPS)/overrides.txt

$(STAMPS)/yolop_mtl: yolop_mtl/pyproject.toml $(STAMPS)/shared_utils
	@echo '==> installing yolop_mtl[openvino,track]'
	@$(NO_DESKTOP)
	@$(UV_INSTALL) --constraint $(TORCH_CONSTRAINTS) --override $(STAMPS)/overrides.txt \
		--editable ./shared_utils --editable './yolop_mtl[openvino,track]'
	@touch $@

# With mmsegmentation: nothing of it is compiled.
$(STAMPS)/dnc: dnc/pyproject.toml $(STAMPS)/shared_utils
	@echo '==> installing dnc[mmseg]'
	@$(NO_DESKTOP)
	@$(UV_INSTALL) --constraint $(TORCH_CONSTRAINTS) --override $(STAMPS)/overrides.txt \
		--editable ./shared_utils --editable './dnc[mmseg]'
	@touch $@

# mmcv is compiled against the torch that is installed, so its build sees this environment; uv keeps
# the wheel. Its own setup asks for a GPU compiler only where torch finds a GPU.
$(STAMPS)/mmdet: dnc/pyproject.toml $(STAMPS)/shared_utils
	@echo '==> building mmcv (minutes; uv keeps the wheel), installing dnc[mmdet]'
	@$(NO_DESKTOP)
	@sed '/^mmcv-lite==/d' $(TORCH_CONSTRAINTS) > $(STAMPS)/constraints-mmdet.txt
	@$(UV_INSTALL) --constraint $(STAMPS)/constraints-mmdet.txt setuptools wheel ninja psutil pytest
	@MMCV_WITH_OPS=1 PATH="$$(pwd -P)/$(BIN):$$PATH" $(UV_INSTALL) \
		--constraint $(STAMPS)/constraints-mmdet.txt --override $(STAMPS)/overrides.txt \
		--no-build-isolation-package mmcv --editable ./shared_utils --editable './dnc[mmdet]'
	@$(BIN)/python -c 'import mmcv.ops' || { \
		echo "error: mmcv: got a build without its compiled operations (see above)," \
			"expected mmcv.ops to load;" \
			"do $(BIN)/uv cache clean mmcv, remove $(VENV) and run make install-mmdet" >&2; \
		exit 1; \
	}
	@touch $@

$(STAMPS)/tools: constraints.txt $(STAMPS)/uv
	@echo '==> installing $(TOOLS)'
	@$(UV_INSTALL) --constraint constraints.txt $(TOOLS)
	@touch $@

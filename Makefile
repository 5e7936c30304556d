# make notebooks | test | lab | lint | report | lock | clean; `make` alone explains.
# Every path is relative, so that a checkout folder may have spaces in its name.

VENV  := .venv
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# Threads that wait must not spin on the cores that others need.
export OMP_WAIT_POLICY ?= passive

# A checkout that was moved or copied installs again: the stamp holds its folder.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(shell pwd))
MOVED := moved
endif

# make notebooks ONLY="10 20" PRESET=full JOBS=1 TIMEOUT=3600
RUN = $(PY) -m saeutils.report $(if $(PRESET),--preset $(PRESET)) \
      $(if $(JOBS),--jobs $(JOBS)) $(if $(TIMEOUT),--timeout $(TIMEOUT))

.PHONY: help notebooks report thumbnails test lab lint format lock clean venv moved bench bench-env assets

help:
	@echo 'make notebooks            run every notebook, write reports/index.html'
	@echo '     ONLY=10              only those that match (also: ONLY="10 20")'
	@echo '     PRESET=smoke|full    seconds, or the sizes of the papers'
	@echo '     JOBS=2 TIMEOUT=600   how many at once; seconds a cell may take'
	@echo 'make report NB=10         one notebook as HTML and PDF'
	@echo 'make test                 all tests   (ARGS="-k store" for some)'
	@echo 'make lab                  JupyterLab in the same environment'
	@echo 'make lint, make format    ruff and nbstripout: check, or mend'
	@echo 'make lock                 pin anew what pyproject.toml asks for'
	@echo 'make bench                speed, memory and quality against other libraries'
	@echo '     ARGS=training        one of benchmarks/*.py, with its options'
	@echo 'make bench-env            the libraries that need an environment of their own'
	@echo 'make assets               stories15M as a local model, by npm: ARGS=--help'
	@echo 'make clean                remove the environment and caches, nothing else'
	@echo 'PYTHON=/path/to/python3.12 chooses the Python for .venv'

notebooks: $(STAMP)
	@$(RUN) $(ONLY)

report: $(STAMP)
	@test -n '$(NB)' || { echo 'Say which notebook: make report NB=10'; exit 2; }
	@$(RUN) --pdf $(NB)

thumbnails: $(STAMP)
	@$(PY) -m saeutils.report --thumbnails $(ONLY)

test: $(STAMP)
	@$(PY) -m pytest $(ARGS)

lab: $(STAMP)
	@$(PY) -m jupyterlab --notebook-dir=notebooks $(ARGS)

lint: $(STAMP)
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(PY) -m nbstripout --keep-id --verify notebooks/*.ipynb && echo 'No outputs in the notebooks.'

format: $(STAMP)
	@$(PY) -m ruff check --fix
	@$(PY) -m ruff format
	@$(PY) -m nbstripout --keep-id notebooks/*.ipynb

bench: $(STAMP)
	@set -- $(or $(ARGS),training quality); \
	case "$$2" in ''|[a-z]*) for b; do $(PY) benchmarks/$$b.py || exit 1; done;; \
	  *) b="$$1"; shift; $(PY) benchmarks/$$b.py "$$@";; esac

# Peers that cannot share .venv; benchmarks leave them out where this was not made.
bench-env: $(STAMP)
	@$(PY) -m venv --clear .venv-bench
	@torch="$$(grep '^torch==' requirements.lock)"; \
	pip() { .venv-bench/bin/python -m pip --quiet --disable-pip-version-check "$$@"; }; \
	pip install "$$torch" && pip install "$$torch" eai-sparsify==1.3.3 dictionary-learning==0.1.0 \
	  && pip uninstall --yes torchvision

# A real TinyStories transformer without the hub; notebooks take its folder as a name.
assets: $(STAMP)
	@$(PY) scripts/make_assets.py $(ARGS)

# What a user made (notebooks, reports, runs, stores) stays.
clean:
	@rm -rf $(VENV) .venv-bench saeutils.egg-info build .pytest_cache .ruff_cache .hypothesis
	@find saeutils tests notebooks benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	@echo 'Removed .venv and caches. Notebooks, reports/ and runs/ were left alone.'

# --- the environment ------------------------------------------------------

venv: $(STAMP)

# A Python that starts, is new enough, and can make environments.
define FIND_PYTHON
ok() { "$$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; }; \
for p in $(if $(PYTHON),'$(PYTHON)',python3 python3.13 python3.12 python3.11 python3.14 python); do \
  if ok "$$p"; then python="$$p"; break; fi; \
done; \
if [ -z "$$python" ]; then \
  echo 'No usable Python found: 3.11 to 3.14 is needed, with its venv module.' >&2; \
  for p in $(if $(PYTHON),'$(PYTHON)',python3); do echo "  $$p is: $$("$$p" --version 2>&1 | head -n 1)" >&2; done; \
  echo '  Install one (Debian: apt install python3 python3-venv), or name it:' >&2; \
  echo '  make notebooks PYTHON=/path/to/python3.12' >&2; \
  exit 1; \
fi
endef

# Runs pip quietly; its whole output is shown only when it fails.
define PIP
$(PY) -m pip install --quiet --disable-pip-version-check --no-input
endef
define OR_SHOW
> $(VENV)/install.log 2>&1 || { tail -n 40 $(VENV)/install.log; echo 'Installation failed (all of it: $(VENV)/install.log). Mend the cause and run the same command again.' >&2; exit 1; }
endef

# torch comes first and alone, so that a CPU build at hand is taken for it. Pinned
# pip is twice as fast as what many Pythons bring, and compiling afterwards uses
# every core (a few packages carry templates that are no Python: not an error).
# The stamp is written last: an interrupted installation is resumed.
$(STAMP): requirements.lock pyproject.toml $(MOVED)
	@$(FIND_PYTHON); \
	rm -f $(STAMP); \
	$(PY) -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || "$$python" -m venv --clear $(VENV) || exit 1; \
	echo "Installing into .venv ($$($(PY) --version)); 1-4 minutes the first time ..."; \
	$(PIP) "$$(grep '^pip==' requirements.lock)" $(OR_SHOW); \
	$(PIP) --no-compile "$$(grep '^torch==' requirements.lock)" --constraint requirements.lock $(OR_SHOW); \
	$(PIP) --no-compile --requirement requirements.lock $(OR_SHOW); \
	$(PIP) --no-deps --no-build-isolation --editable . $(OR_SHOW); \
	$(PY) -m compileall -q -j 0 $(VENV)/lib > /dev/null 2>&1 || true; \
	pwd > $(STAMP)

# Pins what pyproject.toml asks for, in a fresh environment of its own.
# TORCH=torch==2.13.0 chooses torch; its CUDA packages are left to torch itself.
lock:
	@$(FIND_PYTHON); \
	dir="$$(mktemp -d)"; trap 'rm -rf "$$dir"' EXIT; \
	"$$python" -m venv "$$dir/venv" || exit 1; \
	pip() { "$$dir/venv/bin/python" -m pip --disable-pip-version-check "$$@"; }; \
	torch='$(TORCH)'; torch="$${torch:-$$(grep '^torch==' requirements.lock)}"; \
	echo "Resolving, with $$torch ..."; \
	pip install --quiet --upgrade pip 2>"$$dir/log" && pip install --quiet "$$torch" 2>>"$$dir/log" && pip install --quiet '.[all]' 2>>"$$dir/log" \
	  || { tail -n 40 "$$dir/log" >&2; exit 1; }; \
	{ echo '# Exact pins, made by `make lock` from the ranges in pyproject.toml.'; \
	  pip freeze --all 2>/dev/null | grep -viE '^(wheel|saeutils|triton|nvidia[a-z0-9_-]*|cuda[a-z0-9_-]*)[= ]' \
	    | sed -E 's/\+[a-z0-9.]+$$//'; } > "$$dir/lock" \
	  && mv "$$dir/lock" requirements.lock && echo "requirements.lock: $$(grep -c == requirements.lock) pins."

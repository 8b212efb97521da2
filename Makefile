# A thin alias: `python tools/dev.py TASK` does the same on every system.
PYTHON ?= python3

.PHONY: demo test test-comfy faults wheel lint
demo test test-comfy faults wheel lint:
	$(PYTHON) tools/dev.py $@

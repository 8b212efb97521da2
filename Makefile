# A thin alias: `python tools/dev.py TASK` does the same on every system.
PYTHON ?= python3

.PHONY: demo test-quick test accept test-comfy wheel lint
demo test-quick test accept test-comfy wheel lint:
	$(PYTHON) tools/dev.py $@

"""pytest -p tests.standin.plugin FILE: runs the tests of FILE in a process that has the stand-in accelerator."""

from tests.standin.accelerator import install

install()

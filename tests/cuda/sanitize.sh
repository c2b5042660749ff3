#!/bin/sh
# Runs the kernels on a simulator built with the address and undefined-behaviour sanitizers. PYTHON and CXX choose the
# tools; arguments go to pytest.
set -eu
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python}
CXX=${CXX:-g++}
preload=
for runtime in asan ubsan stdc++; do
    preload=$preload${preload:+:}$("$CXX" -print-file-name=lib$runtime.so)
done
# The compiler must not run under them.
FXPRUNE_SANITIZE=1 "$PYTHON" -c "from tests.cuda.simulator import build; build()"
# The interpreter and torch allocate for the life of the process, and a faulty kernel's threads end where they stand.
reports=$(mktemp -d)
trap 'rm -rf "$reports"' EXIT
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0:log_path=$reports/address
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1:log_path=$reports/undefined
status=0
FXPRUNE_SANITIZE=1 LD_PRELOAD=$preload "$PYTHON" -m pytest -q tests/cuda --ignore tests/cuda/test_build.py "$@" || status=$?
# What a process said as it died would be lost with what pytest captured.
find "$reports" -type f -exec head -c 20000 {} + >&2
exit "$status"

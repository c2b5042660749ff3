#!/bin/sh
# Runs the kernel tests on a library built with the address and undefined-behaviour sanitizers, after proving that
# they are on: an operator with a deliberate over-read must be reported. PYTHON and CXX choose the tools.
set -eu
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python}
CXX=${CXX:-g++}
out=build/asan

FXPRUNE_SANITIZE=1 "$PYTHON" setup.py --quiet build_ext --build-lib "$out" --build-temp "$out/tmp"

FXPRUNE_LIBRARY=$PWD/$out/fxprune/_C_cpu.so
preload=
for runtime in asan ubsan stdc++; do
    preload=$preload${preload:+:}$("$CXX" -print-file-name=lib$runtime.so)
done
# The interpreter and torch allocate for the life of the process, which is no leak of ours. A corrupted size that is too
# large must come back as an error, as it does without the sanitizer.
ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1
UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export FXPRUNE_LIBRARY ASAN_OPTIONS UBSAN_OPTIONS

canary='import torch
torch.ops.load_library("'$FXPRUNE_LIBRARY'")
torch.ops.fxprune.asan_canary(torch.ones(16))'
if report=$(LD_PRELOAD=$preload "$PYTHON" -c "$canary" 2>&1); then
    echo "asan: the over-read of asan_canary was not reported" >&2
    exit 1
fi
case $report in
*heap-buffer-overflow*) echo "asan: canary reported" ;;
*)
    echo "asan: asan_canary failed for another reason:" >&2
    echo "$report" >&2
    exit 1
    ;;
esac

LD_PRELOAD=$preload exec "$PYTHON" -m pytest tests/csrc "$@"

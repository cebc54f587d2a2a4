#!/usr/bin/env bash
# The kernels under AddressSanitizer and UBSan: their tests, then FUZZ_S seconds of random calls of every C entry.
# About four minutes on one core; `make sanitize` runs it.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python} build=${BUILD:-build/asan} seconds=${FUZZ_S:-75}

for needed in c++ cmake; do
  if ! command -v "$needed" >/dev/null; then echo "sanitize: skipped: no $needed on this machine"; exit 0; fi
done
preload=
for runtime in libasan.so libubsan.so; do
  file=$(c++ -print-file-name="$runtime")
  if [ ! -e "$file" ]; then echo "sanitize: skipped: the C++ compiler has no $runtime"; exit 0; fi
  preload+="$file "
done

cmake -S kernels -B "$build" -DQLK_SANITIZE=ON -DPython_EXECUTABLE="$(realpath -s "$python")" >/dev/null
cmake --build "$build" --parallel "${JOBS:-2}"
# Python keeps memory to its end. A refused allocation must come back as a status, not end the process.
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export QLORA_LAB_KERNELS=$PWD/$build OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
[[ $build = /* ]] && QLORA_LAB_KERNELS=$build
LD_PRELOAD=$preload "$python" -m pytest -q tests/kernels
LD_PRELOAD=$preload "$python" -m tests.kernels.fuzz --seconds "$seconds"

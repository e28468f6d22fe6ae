#!/usr/bin/env bash
# All that can be said of the GPU half on a machine with a GPU: builds it there, tests it, compares
# it with the CPU to the bit, runs it under compute-sanitizer, and measures it. Under eight minutes.
#
#   bash bench/gpu.sh [OUTPUT_DIR]        # else $OUT, else bench/results
#
# Needs CUDA 13 (nvcc, compute-sanitizer), a Python >= 3.10 as `python3` with torch for that CUDA,
# numpy, pytest, hypothesis, ml_dtypes, and what pyproject.toml builds with; cupy for its test;
# pytest-xdist, where it is there, tests in six processes.
# FUSEDSTEP_GPU_WHEEL, if set, is a wheel with CUDA made elsewhere, for that Python and card, which is
# installed instead: what it saves of the minutes, the rest gets.
# Needs no network. Writes nothing beside the output directory and a temporary one.
# Exits with 1 if a part failed. Whether figures are what was asked is in the table, not in the code.
set -uo pipefail # not -e: a part that fails must not hide the others

# The minutes: seconds from the start after which a part is ended. What a part leaves over, the
# benchmark gets; it begins no figure that it has no time for, and says which it left out.
WHOLE=${FUSEDSTEP_GPU_SECONDS:-470} # eight minutes, less what the summary takes
BUILD=200                           # nvcc on 16 cores; nothing else can run before
CHECKS=130                          # tests and both sanitizers, side by side: nothing is timed
BENCHMARK=235                       # at most; alone on the GPU

cd "$(dirname "$0")/.." || exit 1
out=${1:-${OUT:-bench/results}}
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PATH="$PATH:/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer"
export PYTHONPATH="$work/site" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INDEX=1
CMAKE_BUILD_PARALLEL_LEVEL=$(nproc)
export CMAKE_BUILD_PARALLEL_LEVEL

FUSEDSTEP_GPU_WHEEL=${FUSEDSTEP_GPU_WHEEL:-}

left() { echo $((WHOLE - SECONDS)); }

# part NAME LIMIT COMMAND...: runs it with its output in a file of its own, and files how it ended.
part() {
  local name=$1 limit=$2 begin=$SECONDS state
  shift 2
  ((limit > $(left))) && limit=$(left)
  if ((limit < 5)); then
    state="not run: no time left"
  else
    timeout --kill-after=5 "$limit" "$@" > "$work/$name.log" 2>&1
    case $? in
      0) state=ok ;;
      124 | 137) state="FAILED: ended after $limit s, or killed" ;;
      *) state="FAILED: exit status $?" ;;
    esac
  fi
  printf '%s\t%s\t%s\n' "$name" "$((SECONDS - begin))" "$state" > "$work/$name.state"
}

# say NAME [LINES]: the end of a part's output, and how it ended.
say() {
  local name=$1 seconds state
  IFS=$'\t' read -r _ seconds state < "$work/$name.state"
  echo "== $name ($seconds s): $state"
  [[ -f $work/$name.log ]] && tail -n "${2:-40}" "$work/$name.log"
  [[ $state == ok ]]
}

failed() { ! [[ $(cut -f 3 "$work/$1.state") == ok ]]; }

if ! command -v nvidia-smi > /dev/null || ! nvidia-smi -L > /dev/null; then
  echo "bench/gpu.sh: there is no GPU here, or no driver for it (nvidia-smi -L)" >&2
  exit 1
fi

# Several kinds of card in one machine: for each of them.
architectures=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | tr -d '. ' | sort -u |
  paste -sd ';')
nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv,noheader
echo "for architectures: ${architectures:-none found}"

from=("$FUSEDSTEP_GPU_WHEEL")
if [[ -z $FUSEDSTEP_GPU_WHEEL ]]; then
  from=(--verbose --no-build-isolation --config-settings build-dir="$work/build"
    --config-settings cmake.define.FUSEDSTEP_CUDA=ON
    --config-settings "cmake.define.CMAKE_CUDA_ARCHITECTURES=${architectures:-native}" .)
fi
part build $BUILD python3 -m pip install --no-deps --target "$work/site" "${from[@]}"
if ! say build "$(failed build && echo 80 || echo 12)"; then
  cp "$work/build.log" "$out/gpu-build.log" # there is nothing to test
  exit 1
fi

# Without this the tests below would be skipped, not failed.
cat > "$work/built.py" << 'PYTHON'
import os

import fusedstep as fs

assert fs.__file__.startswith(os.environ["PYTHONPATH"]), f"another fusedstep: {fs.__file__}"
cuda = fs.info()["cuda"]
assert cuda, f"fusedstep must be built with CUDA, got {cuda}"
assert cuda["devices"], f"fusedstep must find a CUDA device, got {cuda}"
PYTHON
part info 40 sh -c 'python3 -m fusedstep info && python3 "$0"' "$work/built.py"
say info

# A sanitizer that did not attach says nothing and fails nothing: its summary must be there.
cat > "$work/sanitize.sh" << 'BASH'
set -o pipefail
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
compute-sanitizer --tool "$1" --launch-timeout 0 --error-exitcode 1 --report-api-errors no \
  python3 bench/gpu.py --small 2>&1 | tee "$0.$1" || exit 1
grep -qE "(ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards)" "$0.$1"
BASH

# Side by side. -v: a test that failed before the time was up is named. What other packages warn of on
# that machine is theirs. The sanitizers see each tensor as an allocation of its own, which torch's
# caching allocator would hide; what torch's own start-up asks of CUDA in vain is not ours to report.
workers=()
if python3 -c 'import xdist' 2> /dev/null; then workers=(-n 6); fi
part tests $CHECKS env FUSEDSTEP_NUM_THREADS=2 OMP_NUM_THREADS=2 \
  python3 -m pytest -v -W default -p no:cacheprovider --durations=8 "${workers[@]}" \
  tests/test_gpu*.py &
for tool in memcheck racecheck; do
  part $tool $CHECKS bash "$work/sanitize.sh" $tool &
done
wait
grep -v ' PASSED' "$work/tests.log" > "$work/tests.short" 2> /dev/null && mv "$work"/tests.{short,log}
say tests 60
say memcheck 25
say racecheck 25

budget=$(($(left) - 20)) # the last figure that it begins, and the files
((budget > BENCHMARK - 20)) && budget=$((BENCHMARK - 20))
part benchmark $BENCHMARK python3 bench/gpu.py -o "$out" --budget "$budget"
say benchmark 140

echo
echo "== summary, $SECONDS s"
status=0
for name in build info tests memcheck racecheck benchmark; do
  IFS=$'\t' read -r _ seconds state < "$work/$name.state"
  printf '%-10s %4s s  %s\n' "$name" "$seconds" "$state"
  failed $name && status=1
  # Kept beside the figures: what was said of a part that failed may be long.
  [[ -f $work/$name.log ]] && failed $name && cp "$work/$name.log" "$out/gpu-$name.log"
done
grep -E '(^| )(FAILED|ERROR) |[0-9]+ (passed|failed)' "$work/tests.log" 2> /dev/null | tail -n 25
exit $status

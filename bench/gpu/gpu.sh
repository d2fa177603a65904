#!/bin/sh
# Tests and measures the GPU kernels in one command, in under 8 minutes, without a network:
#     bench/gpu/gpu.sh [--rehearse] [--out FILE.json]
# The checkout is used as it stands, without its C++ extension. --rehearse runs the same code on the
# CPU, in Triton's interpreter and with tiny sizes, to show that it will run.
set -u
cd "$(dirname "$0")/../.." || exit
export HYPERFAST_NO_EXT=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false
python=${PYTHON:-python3}
case " $* " in *" --rehearse "*) export TRITON_INTERPRET=1 ;; esac

timeout -s INT 200 "$python" -m pytest -q -p no:cacheprovider --maxfail=20 \
    tests/kernels/triton/test_gpu.py
tests=$?
[ "$tests" -eq 124 ] && echo "the tests ran out of their 200 seconds"
timeout 270 "$python" -m bench.gpu --tests-exit "$tests" "$@" || exit
exit "$tests"

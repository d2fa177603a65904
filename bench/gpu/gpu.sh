#!/bin/sh
# Tests and measures the GPU kernels in one command, in under 8 minutes, without a network:
#     bench/gpu/gpu.sh [--rehearse] [--out FILE.json]
# The checkout is used as it stands, without its C++ extension. Where TRITON_PTXAS_PATH names another
# assembler than Triton's own, both are tested, and that one is measured. --rehearse runs the same
# code on the CPU, in Triton's interpreter and with tiny sizes, to show that it will run.
set -u
cd "$(dirname "$0")/../.." || exit
export HYPERFAST_NO_EXT=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false
case " $* " in *" --rehearse "*) export TRITON_INTERPRET=1 ;; esac
exec timeout -k 15 465 "${PYTHON:-python3}" -m bench.gpu "$@"

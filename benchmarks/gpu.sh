#!/bin/sh
# The essential benchmarks on one CUDA card, in under 9 minutes: one table (--json: one object a row with work, ratio, goal).
#
#     benchmarks/gpu.sh [--json]        PYTHON=... names another interpreter than .venv's or python
#
# What is done when the time is up is printed all the same.
here=$(cd "$(dirname "$0")" && pwd)
own=$here/../.venv/bin/python
if [ -z "$PYTHON" ]; then
    if [ -x "$own" ]; then PYTHON=$own; else PYTHON=python; fi
fi
exec timeout --signal=INT --kill-after=20 515 "$PYTHON" "$here/gpu.py" "$@"

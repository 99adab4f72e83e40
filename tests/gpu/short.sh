#!/bin/bash
# What a few minutes on a GPU are best spent on, the unproven first (docs/gpu.md). Usage: tests/gpu/short.sh LOGS [SECONDS]
#
# Each line of servers has a process of its own, so that one that hangs costs only itself; all run side by side, since a
# server of the demo model needs 5 GB and one core. Then, alone, the benchmark of the kernels, and last their tests.
set -u
logs=${1:?folder for logs}
seconds=${2:-240}
mkdir -p "$logs"
export OMP_NUM_THREADS=4 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

check() { # NAME, pytest's -k
    (timeout -s INT "$seconds" python3 -m pytest tests/gpu -s -v -k "$2" --durations 5; echo "exit code $?") >"$logs/$1.log" 2>&1 &
}
# Never run on a GPU: the kernels of the shipped path, alone first, then in servers, whose logs say what the warm-up took.
OMP_NUM_THREADS=1 timeout -s INT 200 python3 -m pytest tests/kernels/refine tests/kernels/standing tests/kernels/repeats tests/kernels/bias \
    tests/kernels/move tests/kernels/test_batch.py -n 8 -q -k "not 1000-8 and not 4097-8" | tail -20 | tee "$logs/shipped-kernels.log"
check key-bias "key_bias"
check plans "sleeping_stream"
check flashinfer-1 "flashinfer and not 16 and not fp8 and not key_bias and not slots_that"
check triton-1 "triton and not 16 and not fp8 and not key_bias and not slots_that"
check flashinfer-16 "flashinfer and 16"
check triton-16 "triton and 16"
check fp8 "fp8"
check stream-order-flashinfer "slots_that and flashinfer"
check stream-order-triton "slots_that and triton"
check retraction "retraction"
check stages "stages_give"
wait
for log in "$logs"/*.log; do
    echo "== $log"
    grep -E "^E  |PASSED|FAILED|ERROR|passed|failed|differ|in common|errors of|exit code" "$log" | tail -20
done
python3 benchmarks/kernels.py --model llama-3.1-8b --ratio 4 | tee "$logs/kernels.jsonl"
OMP_NUM_THREADS=1 timeout -s INT 180 python3 -m pytest tests/kernels --ignore tests/kernels/test_compile_ahead.py -n 8 -q | tail -5

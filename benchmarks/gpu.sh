#!/usr/bin/env bash
# What a GPU session measures: bash benchmarks/gpu.sh A|B|C, from the root of the repository.
#
#   A  versions, the operations that the goals name, tests that need a GPU, a decode step, scan
#   B  a model of an 8B's size from prompt to answer, what its decode launches, a step on keys in host memory, the
#      smaller operations, scan with large heads
#   C  compute-sanitizer, and the operations' tests with the autotuner on
#
# Nothing is installed and no network or git is needed: python3 must have torch, transformers, triton and pytest. A stage
# that would not fit the time left is skipped, and one that runs too long is stopped. After each stage gpu_PHASE.tar.gz in
# $OUT (default: gpu-results) has the log, the results so far and summary.md, which stands beside the goals.
#
#   OUT       folder of the results             SECONDS_IN_ALL  time for everything (default 570)
#   PYTHON    the interpreter (default python3)  DRY=1           tiny sizes on the CPU, to try the script itself
set -u
phase=${1:?give a phase: A, B or C}
case $phase in A | B | C) ;; *) echo "gpu.sh has the phases A, B and C; got $phase." >&2; exit 2 ;; esac
cd "$(dirname "$0")/.." || exit
if [ ! -f benchmarks/record.py ]; then echo "gpu.sh runs in a checkout of farspan." >&2; exit 2; fi

out=${OUT:-$PWD/gpu-results} python=${PYTHON:-python3} end=$((SECONDS + ${SECONDS_IN_ALL:-570})) failed=0
dry=${DRY:-0} device=cuda
[ "$dry" = 1 ] && device=cpu
mkdir -p "$out" || exit
work=$(mktemp -d) || exit
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/path/farspan-0.dist-info" "$work/results"
ln -s "$PWD" "$work/path/farspan" # the checkout is the package
printf 'Metadata-Version: 2.1\nName: farspan\nVersion: 0\n' >"$work/path/farspan-0.dist-info/METADATA"
export PYTHONPATH="$work/path:$PWD" PYTHONUNBUFFERED=1 FARSPAN_RESULTS="$work/results" FARSPAN_CACHE="$work/cache"

# stage NAME SECONDS COMMAND...: run the command, for SECONDS at most, if that much time is left
stage() {
    local name=$1 limit=$2 left=$((end - SECONDS)) begin=$SECONDS code
    shift 2
    if [ "$left" -lt "$limit" ]; then
        echo "$name: skipped, $left s are left of the $limit that it may take" | tee -a "$work/results/stages.txt"
        failed=1
        keep
        return
    fi
    echo "== $name: $*"
    timeout -k 10 "$limit" "$@" 2>&1 | tee "$work/results/$name.log"
    code=${PIPESTATUS[0]}
    [ "$code" = 0 ] || failed=1
    echo "$name: exit $code after $((SECONDS - begin)) s" | tee -a "$work/results/stages.txt"
    keep
}
keep() {
    "$python" -m benchmarks.gpu_summary "$work/results" >"$work/results/summary.md" 2>>"$work/results/stages.txt"
    tar czf "$out/gpu_$phase.tar.gz" -C "$work" results
}
bench() { stage "$1" "$2" "$python" -m "benchmarks.$3" "${@:4}" --device "$device"; }
tests() { stage "$1" "$2" "$python" -m pytest -q -p no:cacheprovider "${@:3}"; }

lengths=8192,65536,131072 keys=131072 scans=8192,32768,65536 small="pool scores select block_max int4_scores"
few=() # options of a benchmark
[ "$dry" = 1 ] && lengths=256 keys=512 scans=256 small="pool select" few=(--repeats 1)

case $phase in
A)
    stage versions 60 "$python" -c "from benchmarks.record import machine; print(machine('$device'))"
    bench block_sparse 150 ops --ops block_sparse --lengths $lengths "${few[@]}"
    bench decode 90 ops --ops decode gather_decode --lengths $keys "${few[@]}"
    bench decode_step 60 decode_step --keys $keys "${few[@]}"
    if [ "$dry" = 1 ]; then tests gpu_tests 120 tests/ops/test_pool.py -k "eager and mean"; else
        tests gpu_tests 140 -n 12 -m gpu tests/ops tests/gpu; fi
    bench scan 60 scan --lengths $scans --repeats 3
    ;;
B)
    if [ "$dry" = 1 ]; then
        bench generate 300 generate --shape tiny --tokens 64 --new 12 --repeats 1 --methods "dense; quest:k=16; quest:k=16 static"
        bench launches 120 launches --shape tiny --tokens 64 --methods "dense; quest:k=16; quest:k=16 static"
    else
        bench generate 300 generate --shape llama-3.1-8b --tokens 32768 --new 64 --repeats 1 --name generate_8b --methods \
            "dense; dense static; dense + double_sparsity:k=2048; dense + double_sparsity:k=2048 static; \
dense + quest:k=2048; dense + quest:k=2048 static; antidiagonal; block_topk:k=4096"
        bench launches 150 launches --shape llama-3.1-8b --tokens 131072 --methods \
            "dense; dense static; double_sparsity:k=2048; double_sparsity:k=2048 static; quest:k=2048; quest:k=2048 static"
    fi
    bench storage_tiers 60 storage_tiers --keys $keys "${few[@]}"
    bench small_ops 120 ops --ops $small --lengths $lengths "${few[@]}"
    bench scan_large 60 scan --lengths $scans --heads 32 --kv-heads 32 --head-dim 128 --repeats 3
    bench scan_backward 60 scan --lengths $scans --backward --repeats 3
    ;;
C)
    if [ "$dry" = 1 ]; then tests tuned 120 -n 1 tests/ops/test_pool.py -k eager; else
        FARSPAN_AUTOTUNE=1 tests tuned 240 -n 4 -m gpu tests/ops
        FARSPAN_AUTOTUNE=0 stage memcheck 200 compute-sanitizer --tool memcheck --error-exitcode 9 \
            "$python" -m pytest -q -x -p no:cacheprovider -m gpu tests/ops/test_gather_decode.py tests/ops/test_pool.py
        FARSPAN_AUTOTUNE=0 stage racecheck 120 compute-sanitizer --tool racecheck --error-exitcode 9 \
            "$python" -m pytest -q -x -p no:cacheprovider -m gpu tests/ops/test_gather_decode.py
    fi
    ;;
esac
cat "$work/results/summary.md"
exit $failed

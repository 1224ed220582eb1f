#!/usr/bin/env bash
# Checks the CUDA kernels on this machine's GPU and times them, in under 10 minutes; prints one short table last.
#   bash tools/gpu_check.sh [correctness sanitizer operators layers models]     all of them unless named
# Environment: PYTHON, the interpreter that has torch and timm (python3); OUT, a folder for the whole log (output/gpu).
# A part that fails says so in its row, and the others go on; the status is 1 if any failed. Nothing is downloaded.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
out=${OUT:-output/gpu}
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/tests:$PWD/tools${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export NATTEN_CACHE_DIR=${NATTEN_CACHE_DIR:-$(mktemp -d)}   # the times of a first call are those of a new machine
rows="$out/rows.txt"
: > "$rows"

wanted=${*:-correctness sanitizer operators layers models}
# Seconds that each part may take; a part stops itself before, and leaves out what it has no time for.
declare -A seconds=([correctness]=110 [sanitizer]=110 [operators]=120 [layers]=40 [models]=160)

status=0
for part in $wanted; do
    limit=${seconds[$part]:-}
    if [ -z "$limit" ]; then
        echo "error: $part is no part: name correctness, sanitizer, operators, layers or models" >&2
        exit 2
    fi
    echo "== $part, at most $limit s"
    if [ "$part" = sanitizer ]; then
        for tool in memcheck racecheck; do
            if ! command -v compute-sanitizer > /dev/null; then
                echo "sanitizer | $tool | not run: compute-sanitizer is not installed" >> "$rows"
            elif timeout $((limit / 2)) compute-sanitizer --tool "$tool" --error-exitcode 9 \
                "$python" tools/gpu_check.py sanitizer > "$out/$tool.log" 2>&1; then
                echo "sanitizer | $tool | clean" >> "$rows"
            else
                echo "sanitizer | $tool | FAILED with status $?: $(grep -m1 -E 'ERROR SUMMARY|=========|Error' "$out/$tool.log" | cut -c1-90)" >> "$rows"
                tail -5 "$out/$tool.log"
                status=1
            fi
        done
        continue
    fi
    timeout $((limit + 20)) "$python" tools/gpu_check.py "$part" --seconds "$limit" --rows "$rows" 2>&1 | tee "$out/$part.log"
    if [ "${PIPESTATUS[0]}" -ne 0 ]; then
        status=1
        echo "$part | | FAILED or out of time: see $out/$part.log" >> "$rows"
    fi
done

echo
"$python" -c 'import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU", "torch", torch.__version__)'
column -t -s '|' "$rows" 2> /dev/null || cat "$rows"
exit $status

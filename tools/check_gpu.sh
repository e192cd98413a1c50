#!/usr/bin/env bash
# Everything that only a GPU can show, in one command of under ten minutes: build, tests,
# compute-sanitizer, benchmarks. Each step has a time limit of its own, and one that fails leaves the
# others alone. Results: docs/benchmarks-CARD-DATE.md and .json.
#
#   tools/check_gpu.sh               needs torch with CUDA, nvcc of the same version, no network
#   tools/check_gpu.sh --dry-run     the same steps on a CPU with tiny sizes, results in output/check_gpu
#   tools/check_gpu.sh --fetch       downloads what a bare machine lacks, to output/wheels, for Python 3.12
#
# PYTHON=...   the interpreter (python3)            OUT=...      where results go (docs)
# WHEELS=...   wheels to install first (output/wheels)   SECONDS_IN_ALL=...   (580)
set -uo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python3}")
[[ $python == /* ]] || python=$PWD/$python
wheels=${WHEELS:-$PWD/output/wheels}
limit_in_all=${SECONDS_IN_ALL:-580}
export OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1

# What a machine with PyTorch, transformers and the usual libraries for tests may still lack, of
# requirements.txt; and deformops to compare with. A wheel of msda-triton, which is not on PyPI, can be
# put beside them.
missing='antlr4-python3-runtime fonttools fvcore iopath msgspec omegaconf portalocker pycocotools setuptools tabulate
    termcolor yacs deformops==3.0.1'

fetch() {
    mkdir -p "$wheels"
    local name requirement platforms='' options='-q --disable-pip-version-check --no-deps'
    for n in 28 27 17; do platforms+=" --platform manylinux_2_${n}_x86_64"; done
    for name in $missing; do
        requirement=$(grep -i "^$name==" requirements.txt | cut -d' ' -f1)
        requirement=${requirement:-$name}
        "$python" -m pip download $options --only-binary=:all: --python-version 3.12 --implementation cp \
            $platforms --platform manylinux2014_x86_64 -d "$wheels" "$requirement" 2> /dev/null ||
            "$python" -m pip wheel $options --no-build-isolation -w "$wheels" "$requirement" || return 1
    done
    local folder; folder=$(mktemp -d)
    PYTHONPATH=third_party/detectron2 "$python" - "$folder" << 'PROGRAM' &&
import sys
from pathlib import Path
import install
folder = Path(sys.argv[1])
install.unpack(install.download(folder / "wheel"), folder / "source")
PROGRAM
    "$python" -m pip wheel $options --no-build-isolation -w "$wheels" "$folder/source" || return 1
    rm -rf "$folder"
    ls "$wheels"
    du -sh "$wheels"
}

dry=
case ${1:-} in
    '') ;;
    --dry-run) dry=1 ;;
    --fetch) fetch; exit ;;
    *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2 ;;
esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
out=$(realpath -m "${OUT:-docs}")
# Built beside the checkout, whose libraries others may be using. Times of files are kept, so that
# what is there already is not compiled again.
cp -rp benchmarks configs ddetr_d2 demo tests tools setup.py pyproject.toml README.md "$work"
logs=$work/logs
mkdir "$logs"
start=$SECONDS

# step NAME LIMIT COMMAND...: runs it for at most LIMIT seconds, notes how it ended.
step() {
    local name=$1 limit=$2 left=$((limit_in_all - SECONDS + start)) begin=$SECONDS outcome
    shift 2
    ((limit < left)) || limit=$left
    if ((limit < 5)); then
        outcome='left out: no time'
    else
        echo "==> $name (at most $limit s)"
        timeout --kill-after=5 "$limit" "$@" > "$logs/$name.log" 2>&1 < /dev/null
        case $? in
            0) outcome=done ;;
            124 | 137) outcome="stopped after $limit s" ;;
            *) outcome=failed; tail -n 15 "$logs/$name.log" ;;
        esac
    fi
    printf '%s\t%s\t%s\n' "$name" "$outcome" $((SECONDS - begin)) >> "$logs/steps.tsv"
    echo "    $outcome, $((SECONDS - begin)) s"
}

if [[ $dry ]]; then
    out=$(realpath -m "${OUT:-output/check_gpu}")
    device=cpu turns=1
    types='float32 bfloat16'
    size=64x96 model='--quick --sizes 64x96' training='--quick --sizes 64x96'
else
    device=cuda turns=3
    types='float32 bfloat16 float16'
    size=800x1333 model='--sizes 800x1066' training='--sizes 800x1066 --dtype float32 float16'
fi
pytest="$python -m pytest -q -p no:cacheprovider -m gpu tests/layers"
bench="$python -m benchmarks"
few="--device $device --repeats $turns --no-memory"

if compgen -G "$wheels/*.whl" > /dev/null && [[ ! $dry ]]; then
    step wheels 60 "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
        --upgrade --target "$work/site" "$wheels"/*.whl
    export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
fi
cd "$work"
[[ $dry ]] || { nvidia-smi; nvcc --version; } > "$logs/machine.log" 2>&1
step imports 60 "$python" -c 'import cv2, ddetr_d2, pycocotools, transformers'
grep -q ModuleNotFoundError "$logs/imports.log" &&
    echo '    where there is a network, tools/check_gpu.sh --fetch gets what is missing'
step build 180 "$python" setup.py build_ext --inplace
step tests 150 $pytest
# Under it a program takes many times as long: all kernels, with few cases.
if command -v compute-sanitizer > /dev/null; then
    sanitizer='env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9'
    step memcheck 75 $sanitizer --tool memcheck $pytest -k follows_the_reference
    step racecheck 45 $sanitizer --tool racecheck $pytest -k follows_the_reference
else
    printf 'memcheck\tleft out: no compute-sanitizer\t0\n' >> "$logs/steps.tsv"
fi
# A process for each type: what goes wrong in one leaves the others alone. The first one measures
# the host's time as well.
only=
for type in $types; do
    step "operator_$type" 80 $bench operator $few --sizes $size --dtype $type $only \
        --json "$logs/operator_$type.json"
    only="--only $size"
done
step model 110 $bench model $few $model --json "$logs/model.json"
step training 90 $bench training $few $training --json "$logs/training.json"
"$python" -m benchmarks.gpu_report "$logs" --to "$out"
tail -n +1 "$logs"/*.log | sed 's/.*\r//' > "$out/check_gpu.log"
echo "logs: $out/check_gpu.log; $((SECONDS - start)) s in all"
! cut -f2 "$logs/steps.tsv" | grep -qvE '^(done|left out: no compute-sanitizer)'

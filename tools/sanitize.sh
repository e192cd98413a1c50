#!/usr/bin/env bash
# The tests of the operator, with its CPU kernels compiled by GCC under AddressSanitizer and UBSan,
# once for each kind of vector instructions that this machine has. The usual build is left alone.
#
#   tools/sanitize.sh [pytest options]            PYTHON=... chooses the interpreter
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python}")
[[ $python == /* ]] || python=$PWD/$python
export CXX=${CXX:-g++} OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}

build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
cp -r configs ddetr_d2 tests setup.py pyproject.toml "$build"
cd "$build"
find . -name '*.so' -delete

echo '==> Compiling'
# Conversions of numbers out of range are no part of "undefined"; vptr needs all of torch compiled alike.
flags='-fsanitize=address,undefined,float-cast-overflow -fno-sanitize=vptr -fno-sanitize-recover=all'
env -u FORCE_CUDA CUDA_VISIBLE_DEVICES= CFLAGS="$flags -fno-omit-frame-pointer -g1 -Wno-psabi" \
    "$python" setup.py build_ext --inplace > build.log 2>&1 || { tail -n 40 build.log; exit 1; }
grep -q __asan_report ddetr_d2/layers/ops_cpu.so || { echo 'error: the build has no sanitizers' >&2; exit 1; }

preload=
for library in libasan.so libubsan.so libstdc++.so.6; do
    preload+=" $("$CXX" -print-file-name=$library)"
done
case $("$python" -c 'import torch; print(torch.backends.cpu.get_cpu_capability())') in
    AVX512*) kinds='default avx2 avx512' ;;
    AVX2) kinds='default avx2' ;;
    *) kinds=default ;;
esac
for kind in $kinds; do
    echo "==> Tests with ATEN_CPU_CAPABILITY=$kind"
    # Python and torch keep memory until they end. A report goes past pytest, which it ends.
    ATEN_CPU_CAPABILITY=$kind LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0 \
        UBSAN_OPTIONS=print_stacktrace=1 "$python" -m pytest -q -p no:cacheprovider --capture=sys \
        -k 'not test_compile and not lesser_processors' tests/layers/test_ms_deform_attn.py \
        tests/layers/test_ms_deform_attn_16_bit.py tests/modeling/test_inference.py "$@"
done

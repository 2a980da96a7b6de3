#!/bin/sh
# The kernels' tests once more, with AddressSanitizer and UndefinedBehaviorSanitizer in the library:
# a read or write outside a tensor, or an undefined shift or overflow, ends the run. Before that,
# the pool of threads alone under ThreadSanitizer.
set -eu
cd "$(dirname "$0")/../../.."
PYTHON=${PYTHON:-python}
CC=${CC:-cc}
export CC
case $("$CC" -print-file-name=libtsan.so) in
/*)
    race=$(mktemp)
    "$CC" -g -O1 -std=gnu11 -pthread -fsanitize=thread -Ibase/kernels/csrc \
        tests/base/kernels/pool_race.c base/kernels/csrc/pool.c -o "$race"
    "$race"
    rm -f "$race"
    ;;
esac
export NIBBLE_CFLAGS="-g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0
NIBBLE_NATIVE=$(mktemp -d)
trap 'rm -rf "$NIBBLE_NATIVE"' EXIT
"$PYTHON" -c 'import sys; from pathlib import Path; from base.kernels.build import build
sys.exit(0 if build(Path(sys.argv[1])) else "not built")' "$NIBBLE_NATIVE"
export NIBBLE_NATIVE
# Before everything else in the process, so that torch's tensors get guard zones too.
LD_PRELOAD="$("$CC" -print-file-name=libasan.so) $("$CC" -print-file-name=libubsan.so)" \
    "$PYTHON" -m pytest -q -p no:cacheprovider -o timeout=900 \
    tests/base/kernels/test_native_nf4.py \
    tests/base/kernels/test_native_fast.py \
    tests/base/kernels/test_rounded.py \
    tests/base/kernels/test_native_reduce.py \
    tests/base/kernels/test_native_lowrank.py \
    tests/base/kernels/test_native_attention.py \
    tests/base/kernels/test_kv_rows.py \
    tests/base/kernels/test_native_steps.py \
    tests/base/kernels/test_tiles.py \
    tests/base/fused/test_decoder.py \
    tests/service/engine/test_whole_layers.py "$@"

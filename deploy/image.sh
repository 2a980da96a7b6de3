#!/usr/bin/env bash
# Builds the Dockerfile and runs what came out: serve as uid 10001, generate, SIGTERM. Root, Debian's
# buildah and mmdebstrap are needed; no daemon is, and no registry. Ten minutes on two busy cores.
#   BASE_TAR   a root filesystem to build on, instead of a new one by mmdebstrap
#   WHEELS     a folder of wheels, instead of those that pip downloads first
set -euo pipefail
cd "$(dirname "$0")/.."
for needed in buildah mmdebstrap; do
  command -v "$needed" >/dev/null || { echo "$needed is needed: apt-get install buildah mmdebstrap" >&2; exit 1; }
done
[ "$(id -u)" = 0 ] || { echo "run it as root: chroot isolation needs it" >&2; exit 1; }

work=$(mktemp -d)
cleaned() { buildah --root "$work/store" --runroot "$work/run" rm --all >/dev/null 2>&1 || true; rm -rf "$work"; }
trap cleaned EXIT
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs
b() { buildah --root "$work/store" --runroot "$work/run" "$@"; }

base=${BASE_TAR:-$work/base.tar}
[ -f "$base" ] || mmdebstrap --variant=minbase --include=ca-certificates bookworm "$base"
wheels=${WHEELS:-$work/wheels}
if [ ! -d "$wheels" ]; then  # for the same Python as the image's
  .venv/bin/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > "$work/wanted"
  .venv/bin/python -m pip download -q --progress-bar off -c constraints.txt -d "$wheels" setuptools -r "$work/wanted"
fi

empty=$(b from scratch)
b add -q "$empty" "$base" / >/dev/null
b config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$empty"
b commit -q "$empty" localhost/base >/dev/null
b rm "$empty" >/dev/null

mkdir "$work/context"
git ls-files -z | tar --null --ignore-failed-read -T - -cf - | tar -xf - -C "$work/context"
b bud --format docker --pull-never --volume "$wheels:/wheels:ro" --build-arg BASE=localhost/base \
  --build-arg PIP_FIND_LINKS=/wheels --build-arg PIP_NO_INDEX=1 -t nibble "$work/context"
echo "built after $SECONDS s"
deploy/image-run.sh "$work/store" "$work/run" nibble

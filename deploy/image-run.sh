#!/usr/bin/env bash
# image-run.sh STORE RUNROOT IMAGE: what a user does first with an image, in buildah's chroot.
set -euo pipefail
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs
b() { buildah --root "$store" --runroot "$runroot" "$@"; }
store=$1 runroot=$2 image=$3
port=$((20000 + RANDOM % 20000))
url=http://127.0.0.1:$port

config=$(b inspect --type image "$image")
for wanted in '"User": "10001:10001"' '"Healthcheck"' '"StopSignal": "SIGTERM"'; do
  grep -qF "$wanted" <<<"$config" || { echo "the image has no $wanted" >&2; exit 1; }
done
size=$(b images --format '{{.Size}}' "$image")
container=$(b from --pull-never "$image")
root=$(b mount "$container")
found=$(find "$root/opt/nibble" -name '*.safetensors' -size +32M)
[ -z "$found" ] || { echo "weights inside: $found" >&2; exit 1; }
touch "$root/before"

b run --env NIBBLE_PORT=$port --env NIBBLE_HOST=127.0.0.1 "$container" -- nibble serve &
runner=$!
trap 'kill "$runner" 2>/dev/null || true' EXIT
for _ in $(seq 300); do
  curl -sf "$url/ready" >/dev/null && break
  kill -0 "$runner" || { echo "the server ended" >&2; exit 1; }
  sleep 1
done
curl -sf "$url/info" >/dev/null
# The image's own HEALTHCHECK: well at this port, and not where nobody listens.
mapfile -d '' -t check < <(python3 -c '
import json, sys
kind, *command = json.load(sys.stdin)["Docker"]["config"]["Healthcheck"]["Test"]
assert kind == "CMD", kind
print(*command, sep="\0", end="\0")
' <<<"$config")
[ "${#check[@]}" -gt 0 ] || { echo "the image has no command for its health" >&2; exit 1; }
b run --env NIBBLE_PORT=$port "$container" -- "${check[@]}"
if b run --env NIBBLE_PORT=1 "$container" -- "${check[@]}" 2>/dev/null; then
  echo "the healthcheck passes where no server is" >&2
  exit 1
fi
text=$(curl -sf "$url/generate" -H 'content-type: application/json' \
  -d '{"inputs": [{"role": "user", "content": "Encode: the old king finds a lamp"}], "parameters": {"adapter_id": "cipher"}}')
echo "$text"
[ "$text" = '{"generated_text":"ul keshi hatto quelo bo wembi"}' ]

# The server itself: what buildah runs it with has its command line in its own.
server=$(pgrep -u 10001 -f '^/opt/nibble/bin/python[^ ]* [^ ]*/nibble serve')
[ "$(stat -c %u "/proc/$server")" = 10001 ]
written=$(find "$root" -xdev -newer "$root/before" -type f -not -path "$root/data/*" \
  -not -path "$root/tmp/*" -not -path "$root/run/*" -not -path "$root/etc/*" | head)
[ -z "$written" ] || { echo "written outside of /data and /tmp: $written" >&2; exit 1; }
kill -TERM "$server"
status=0
wait "$runner" || status=$?
[ "$status" = 0 ] || { echo "SIGTERM ended it with $status, not 0" >&2; exit 1; }
trap - EXIT
b rm "$container" >/dev/null
echo "the image ($size) serves as uid 10001, generates, and stops on SIGTERM with 0"

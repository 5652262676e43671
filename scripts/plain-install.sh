#!/bin/sh
# Prints the plain install of manifests/install/foreshard.yaml: what the chart makes by default, and its namespace.
set -eu
cd "$(dirname "$0")/.."
printf -- '# Made from charts/foreshard by `make manifests`.\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: foreshard-system\n'
.foreshard/cluster/bin/helm template foreshard charts/foreshard --namespace foreshard-system | grep -v '^# Source'

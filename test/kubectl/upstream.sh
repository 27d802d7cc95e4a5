#!/usr/bin/env bash
# Runs upstream's kubectl tests (test/cmd of Kubernetes' source) on a cluster that is
# there, in place of hack/make-rules/test-cmd.sh, which starts one of its own.
#
#   TREE   the folder with hack/, test/cmd/ …: what the tests read and write
#   BIN    the folder of kubectl and kubectl-convert
#   PORT   where the API server is, on 127.0.0.1
#   TOKEN  an administrator's
#   WHAT   names of tests without run_ and _tests; none: all
set -o errexit -o nounset -o pipefail
cd "$TREE"
export LANG=C KUBE_ROOT="$TREE" THIS_PLATFORM_BIN="$BIN" SECURE_API_PORT="$PORT" KUBE_JUNIT_REPORT_DIR="$TREE/junit"
export SUPPORTED_RESOURCES='*'
mkdir -p "$KUBE_JUNIT_REPORT_DIR"
source hack/lib/util.sh
source hack/lib/logging.sh
kube::log::install_errexit
source hack/lib/test.sh
source test/cmd/legacy-script.sh
kube::etcd::cleanup() { :; }

kube::util::trap_add cleanup EXIT SIGINT
kube::util::ensure-temp-dir
HOME=$KUBE_TEMP
kube::util::ensure-gnu-sed
CONTEXT=test
kubectl config set-credentials test-admin --token "$TOKEN"
kubectl config set-cluster local --insecure-skip-tls-verify --server "https://127.0.0.1:$PORT"
kubectl config set-context "$CONTEXT" --user test-admin --cluster local
kubectl config use-context "$CONTEXT"

# Upstream's runs have one Node that nobody serves. Its annotation keeps a manager of fields.
kubectl create -f - <<'EOF'
{"apiVersion": "v1", "kind": "Node",
 "metadata": {"name": "127.0.0.1", "annotations": {"save-managers": "true"}},
 "status": {"capacity": {"memory": "1Gi"}}}
EOF
runTests

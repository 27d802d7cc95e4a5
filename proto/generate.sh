#!/usr/bin/env bash
# Generates the Go code of proto/timonel/v1. Needs protoc; the plugins come from go.mod.
set -euo pipefail
cd "$(dirname "$0")"
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
GOBIN=$bin go install google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc
PATH=$bin:$PATH protoc -I. --go_out=.. --go_opt=module=timonel --go-grpc_out=.. --go-grpc_opt=module=timonel timonel/v1/*.proto

# Timonel. `make help` lists what there is to make.

SHELL       := /bin/bash
GO          ?= go
VERSION     := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
KUBERNETES  := $(shell awk '$$1 == "k8s.io/kubernetes" {print $$2; exit}' go.mod)
KUBEVERSION := k8s.io/component-base/version
LDFLAGS     := -s -w -X main.version=$(VERSION) -X $(KUBEVERSION).gitVersion=$(KUBERNETES) \
	-X $(KUBEVERSION).gitMajor=1 -X $(KUBEVERSION).gitMinor=$(word 2,$(subst ., ,$(KUBERNETES)))
GOFLAGS     += -buildvcs=false
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
SUDO        := $(if $(filter 0,$(shell id -u)),,sudo)
PROGRAMS    := controller agent timonel machine
IMAGES      := bin/images/timonel-sample.tar
CONTAINERD  := github.com/containerd/containerd/v2
RUNC        := github.com/opencontainers/runc
version      = $(shell awk '$$1 == "$(1)" {print $$2; exit}' deploy/runtime/go.mod)
# No C in what we build; the race detector alone needs it.
export CGO_ENABLED := 0
export GOFLAGS

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: up
up: deps build images runtime-if-needed ## Bring a cluster up: three controllers, two agents, a sample application
	$(SUDO) bin/timonel up

.PHONY: down
down: ## Take it down; nothing of it is left
	@test -x bin/timonel || $(MAKE) build
	$(SUDO) bin/timonel down

.PHONY: build
build: ## Build the programs into bin/
	@mkdir -p bin
	$(GO) build -ldflags '$(LDFLAGS)' -o bin/ $(PROGRAMS:%=./cmd/%)

# A controller that runs under the first cluster version alone, for tests of upgrades.
.PHONY: older
older: build
	@mkdir -p bin/older
	$(GO) build -ldflags '$(LDFLAGS) -X main.newestVersion=1' -o bin/older/ ./cmd/controller
	@cp bin/agent bin/machine bin/older/

# Of modules of its own, so that what it takes is no matter of ours. cgo for runc, which enters
# namespaces before Go has started, and seccomp's library.
.PHONY: runtime
runtime: ## Build containerd and runc from their Go modules into bin/runtime: newer than the system's are, often
	@.ci/deps runtime
	@mkdir -p bin/runtime
	cd deploy/runtime && $(GO) build -tags 'no_btrfs no_zfs no_devmapper' -ldflags '-s -w -X $(CONTAINERD)/version.Version=$(call version,$(CONTAINERD))' \
		-o ../../bin/runtime/ $(CONTAINERD)/cmd/containerd $(CONTAINERD)/cmd/containerd-shim-runc-v2
	cd deploy/runtime && CGO_ENABLED=1 $(GO) build -tags seccomp -ldflags '-s -w' -o ../../bin/runtime/ $(RUNC)

# Built when the system's are too old for something that pods may ask for (deploy/runtime/README.md).
.PHONY: runtime-if-needed
runtime-if-needed:
	@test -x bin/runtime/runc || .ci/runtime-is-new || $(MAKE) runtime

.PHONY: images
images: $(IMAGES) ## Build the images that agents import, into bin/images

$(IMAGES): $(wildcard images/*/*.go)
	$(GO) run ./images/build -out bin/images

.PHONY: deps
deps: ## Install what is missing of the system's packages (apt)
	@.ci/deps

.PHONY: test
test: deps lint unit e2e ## Check everything: lint, unit tests with the race detector, and a real cluster

.PHONY: lint
lint: ## gofmt, go vet, staticcheck, and that the agent reaches no file by path
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { gofmt -l $$(git ls-files '*.go'); echo 'make lint: run gofmt -w on these files'; exit 1; }
	$(GO) run ./internal/lint
	$(GO) vet -tags 'e2e chaos' ./...
	$(GO) run $(STATICCHECK) -tags 'e2e chaos' ./...

# The race detector doubles what the API server's 2,000 packages cost to build,
# so packages that need those run without it; and so do simulations and what moves many
# bytes, which take some six times as long with it: there it sees a part of them.
.PHONY: unit
unit: ## Unit tests
	@rm -rf bin/race && mkdir -p bin/race
	CGO_ENABLED=1 GORACE="log_path=$(CURDIR)/bin/race/report" $(GO) test -race -timeout 40m $$(.ci/packages light) || { head -qn 45 bin/race/* 2>/dev/null; exit 1; }
	$(GO) test ./consensus -run '^(TestMemberMovesToAnotherAddress|TestBoltGoesOnAfterAFailedCommit|TestLogStaysBounded|TestJournalPowerCut|TestDataFile|TestHeldIsBoundedInBytes|TestAFollowerFarBehindCatchesUpOverASlowLink)$$'
	$(GO) test ./test/sim -runs 300 -from 1000 -timeout 30m
	$(GO) test $$(.ci/packages heavy)

.PHONY: e2e
e2e: build older images ## A real cluster: deploy, kill the leader, bad input
	$(SUDO) env "PATH=$$PATH" "GOFLAGS=$$GOFLAGS" CGO_ENABLED=0 $(GO) test -tags e2e -count 1 -timeout 25m -v ./test/e2e

# SEED= or MINUTES= choose the random mix alone: see test/chaos/mix_test.go.
.PHONY: chaos
chaos: build images ## Break a real cluster in every way we know; SEED=n MINUTES=m repeats one random mix, FAULTS=regexp of these alone; KILLS=n leaders die while workloads run
	@.ci/deps chaos
	$(SUDO) env "PATH=$$PATH" "GOFLAGS=$$GOFLAGS" CGO_ENABLED=0 "SEED=$(SEED)" "MINUTES=$(MINUTES)" "FAULTS=$(FAULTS)" "KILLS=$(KILLS)" \
		$(GO) test -tags chaos -count 1 -timeout $(if $(MINUTES),$(shell echo $$(( $(firstword $(subst ., ,$(MINUTES))) + 30 ))),90)m $(if $(SEED)$(MINUTES),-run '^TestMix$$') -v ./test/chaos

# FOCUS= SKIP= REPEAT=n LOAD=1 GROW=1 KEEP=1: see test/conformance/doc.go. The first build takes minutes.
.PHONY: conformance
conformance: build conformance-suite ## Upstream's conformance tests on a cluster of its own: FOCUS=regexp SKIP=regexp REPEAT=n
	$(SUDO) env "PATH=$$PATH" bin/conformance/run -focus '$(FOCUS)' -skip '$(SKIP)' $(if $(REPEAT),-repeat $(REPEAT)) \
		$(if $(LABELS),-labels '$(LABELS)') $(if $(LOAD),-load) $(if $(GROW),-grow) $(if $(KEEP),-keep)

# Of each SIG some, as long as a cup of tea: what .ci/run runs.
.PHONY: conformance-part
conformance-part: build conformance-suite ## Some of upstream's conformance tests of each SIG: those that test/conformance/part.txt lists
	$(SUDO) env "PATH=$$PATH" bin/conformance/run -list test/conformance/part.txt

.PHONY: conformance-suite
conformance-suite:
	@.ci/deps conformance
	@mkdir -p bin/conformance
	cd test/conformance/upstream && $(GO) build -ldflags '$(LDFLAGS)' -o ../../../bin/conformance/ github.com/onsi/ginkgo/v2/ginkgo \
		k8s.io/kubernetes/cmd/kubectl k8s.io/kubernetes/test/images/agnhost k8s.io/kubernetes/test/images/nonewprivs k8s.io/sample-apiserver
	cd test/conformance/upstream && $(GO) test -c -vet=off -ldflags '$(LDFLAGS)' -o ../../../bin/conformance/e2e.test k8s.io/kubernetes/test/e2e
	cd test/bench/etcd && $(GO) build -ldflags '-s -w' -o ../../../bin/conformance/etcd .
	$(SUDO) env "PATH=$$PATH" "GOFLAGS=$$GOFLAGS" $(GO) run ./images/build -out bin/conformance/images -suite bin/conformance
	$(GO) build -o bin/conformance/run ./test/conformance

# WHAT=names KEEP=1: see test/kubectl/doc.go.
.PHONY: kubectl-tests
kubectl-tests: build ## Upstream's kubectl tests (test/cmd) on a cluster of its own: WHAT='crd kubectl_get' for some
	@.ci/deps kubectl
	@mkdir -p bin/kubectl-tests
	cd test/conformance/upstream && $(GO) build -ldflags '$(LDFLAGS)' -o ../../../bin/kubectl-tests/ \
		k8s.io/kubernetes/cmd/kubectl k8s.io/kubernetes/cmd/kubectl-convert
	$(GO) build -o bin/kubectl-tests/run ./test/kubectl
	$(SUDO) env "PATH=$$PATH" bin/kubectl-tests/run -source "$$(cd test/conformance/upstream && $(GO) list -m -f '{{.Dir}}' k8s.io/kubernetes)" \
		-what '$(WHAT)' $(if $(KEEP),-keep)

.PHONY: bench
bench: ## Measure beside Kubernetes on etcd: BENCH="-sides timonel -rows get32 -seconds 5"
	@mkdir -p bin/bench
	$(GO) build -ldflags '$(LDFLAGS)' -o bin/ ./cmd/controller
	cd test/bench/etcd && $(GO) build -o ../../../bin/bench/etcd .
	cd test/bench/kubernetes && $(GO) build -ldflags '$(LDFLAGS)' -o ../../../bin/bench/ \
		$(addprefix k8s.io/kubernetes/cmd/,kube-apiserver kube-scheduler kube-controller-manager)
	$(GO) run ./test/bench $(BENCH)

.PHONY: bench-parts
bench-parts: ## Benchmarks of the log, the state and the scheduler; growth to 150,000 pods
	$(GO) test -run '^$$' -bench . -benchmem ./consensus ./state ./sched
	TIMONEL_GROWTH=1 $(GO) test -run Growth -bench . -count 1 -v -timeout 20m ./test/bench

.PHONY: bench-network
bench-network: deps ## Packets beside bare namespaces, policies, Services beside kube-proxy, names beside CoreDNS, and what 100 agents are told
	@mkdir -p bin/bench
	cd test/bench/coredns && $(GO) build -ldflags '-s -w' -o ../../../bin/bench/coredns .
	$(SUDO) env "PATH=$$PATH" "GOFLAGS=$$GOFLAGS" CGO_ENABLED=0 $(GO) test -run '^$$' -bench . -benchtime 5x -timeout 60m ./test/bench/packets ./test/bench/services
	$(GO) test -run '^$$' -bench . -benchtime 100000x ./test/bench/names
	$(GO) test -run '^$$' -bench 'To100' -benchtime 50x ./dispatch/network

.PHONY: generate
generate: ## Generate code from proto/
	proto/generate.sh

.PHONY: drift
drift: generate ## Fail when generated code is not what is checked in
	git diff --exit-code -- proto

.PHONY: clean
clean: ## Delete what was built
	rm -rf bin

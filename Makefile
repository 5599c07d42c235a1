# Common tasks; `make` lists them. After `make setup`, plain `cargo build --release` works too.

# tch 0.24 requires exactly this libtorch. PyPI's torch contains it, for CPU and for CUDA 13; it links
# to the other two packages. Its Python files never run, so any Python with pip works, and the wheels
# for one Python version are used regardless of its version.
LIBTORCH_PARTS := torch==2.11.0 nvidia-cuda-runtime~=13.0.0 nvidia-cuda-cupti~=13.0.0
LIBTORCH_PYTHON := 3.12

# The dependencies of its CUDA half, from its METADATA. They replace the two packages above by the same
# versions. Downloaded if the device file of the NVIDIA driver exists.
NVIDIA_FILE := /dev/nvidiactl
NVIDIA_PARTS := 'cuda-toolkit[cublas,cudart,cufft,cufile,cupti,curand,cusolver,cusparse,nvjitlink,nvrtc,nvtx]==13.0.2' \
  nvidia-cudnn-cu13==9.19.0.56 nvidia-cusparselt-cu13==0.8.0 nvidia-nccl-cu13==2.28.9 nvidia-nvshmem-cu13==3.4.5

# Created last: without it, .libtorch may be an incomplete download.
LIBTORCH_COMPLETE := .libtorch/complete-2.11.0
NVIDIA_COMPLETE := .libtorch/complete-2.11.0-cuda-13.0.2

# With --target, pip does not touch the system's Python, and Debian's "externally managed" rule does
# not apply.
FETCH := python3 -m pip install --target .libtorch --no-compile --only-binary=:all: \
  --python-version $(LIBTORCH_PYTHON) --disable-pip-version-check

.PHONY: help setup demo benchmark-demo test screenshots audit world parity benchmark-parity bench gpu-kit cluster-test

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

ifdef LIBTORCH
setup: tools ## download libtorch into .libtorch, unless LIBTORCH is set (once; 0.5 GB, or 2.5 GB with an NVIDIA driver)
	@test -e "$(LIBTORCH)/lib/libtorch_cpu.so" || { \
	  echo "LIBTORCH is $(LIBTORCH), which has no lib/libtorch_cpu.so: unset it, and" \
	       "'make setup' downloads libtorch, or set it to the folder of an installed torch" >&2; exit 1; }
else
setup: tools $(if $(wildcard $(NVIDIA_FILE)),$(NVIDIA_COMPLETE),$(LIBTORCH_COMPLETE))
endif

demo: setup ## build, and run pipelines/dpo.yaml: three rounds on the small world
	cargo build --release
	cargo run --release --quiet --bin pipeline -- run pipelines/dpo.yaml

# The judge is a program of this machine, which ends with the recipe.
benchmark-demo: demo ## the small world's benchmarks: base against chat, with a judge on this machine (needs ffmpeg)
	cargo run --release --quiet --bin pipeline -- run pipelines/video.yaml
	cargo build --release --example benchmark_judge
	cargo run --release --quiet --example benchmark_judge & judge=$$!; trap 'kill $$judge' EXIT; \
	cargo run --release --quiet --bin pipeline -- run pipelines/benchmarks/small-world.yaml

# The checker of accessibility for the tests of pages: one script, in a package of PyPI.
AXE := .axe/axe_playwright_python/axe.min.js

test: setup $(AXE) ## run the tests: code, schemas, layering, formatting
	cargo test --release
	@command -v ffmpeg >/dev/null || echo "SKIPPED: the tests of videos need ffmpeg (apt-get install ffmpeg)"
	@test -n "$$OVCHAT_CHROMIUM" || command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	  echo "SKIPPED: the tests of pages in a browser need Chromium (apt-get install chromium)"
	@test -e $(AXE) || echo "SKIPPED: the tests of accessibility need axe-core, which could not be downloaded"

$(AXE):
	-python3 -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --only-binary=:all: \
	  --target .axe axe-playwright-python==0.1.8

screenshots: demo ## draw the pictures of examples/VIEW.md (needs Chromium)
	cargo test --release --test main -- --ignored screenshots

audit: ## check the crates: licenses, sources, versions, advisories (skips what it cannot download)
	.ci/audit

world: setup ## rebuild data-samples with its four models from scratch (two and a half hours; needs ffmpeg)
	cargo build --release --bins -p ovchat -p small-world
	rm -rf data-samples/images data-samples/clips
	cargo run --release --quiet -p small-world -- world data-samples
	cargo run --release --quiet -p small-world -- clips data-samples
	cargo run --release --quiet -p small-world -- lessons runs/lessons
	cargo run --release --quiet -p small-world -- clip-lessons runs/clip-lessons
	cargo run --release --quiet --bin pipeline -- run pipelines/small-world.yaml
	cargo run --release --quiet --bin pipeline -- run pipelines/small-world-critic.yaml
	rm -rf data-samples/policy data-samples/reward data-samples/critic
	cargo run --release --quiet --bin pipeline -- export small-world-models checkpoint --model policy --to data-samples/policy
	cargo run --release --quiet --bin pipeline -- export small-world-models checkpoint --model judge --to data-samples/reward
	cargo run --release --quiet --bin pipeline -- export small-world-critic checkpoint --to data-samples/critic
	cp runs/lessons/start/reward/prompt.txt data-samples/reward/
	cargo run --release --quiet --bin pipeline -- run pipelines/small-world-video.yaml
	rm -rf data-samples/video-policy
	cargo run --release --quiet --bin pipeline -- export small-world-video checkpoint --to data-samples/video-policy

# PARITY_PYTHON can name a Python that already has the packages of tests/parity/requirements.txt.
ifdef PARITY_PYTHON
parity: setup
	$(PARITY_PYTHON) tests/parity/run.py
else
parity: setup .parity/complete ## compare with transformers, TRL and PyTorch on fresh random cases (5 GB of Python)
	.parity/bin/python tests/parity/run.py
endif

# PARITY_PYTHON can name a Python that has numpy, pandas, scikit-learn and pyyaml.
LMMS_EVAL := lmms-eval==0.7.3
benchmark-parity: setup .parity-lmms/complete ## compare the benchmarks' scores with lmms-eval on fresh replies
	$(BENCHMARK_PYTHON) tests/parity/benchmarks.py .parity-lmms/lmms_eval-*.whl $$(date +%s) $(CURDIR)/.parity-lmms/recording.json
	OVCHAT_BENCHMARKS=$(CURDIR)/.parity-lmms/recording.json OVCHAT_BENCHMARKS_PAGE=$(CURDIR)/benches/BENCHMARKS.md \
	  cargo test --release --quiet --lib -p ovchat -p ovchat-torch -p ovchat-pipeline lmms_eval

ifdef PARITY_PYTHON
BENCHMARK_PYTHON := $(PARITY_PYTHON)
else
BENCHMARK_PYTHON := PYTHONPATH=.parity-lmms/packages python3
endif

.parity-lmms/complete:
	rm -rf .parity-lmms
	python3 -m pip download --disable-pip-version-check --no-deps --only-binary=:all: --dest .parity-lmms $(LMMS_EVAL)
ifndef PARITY_PYTHON
	python3 -m pip install --disable-pip-version-check --target .parity-lmms/packages numpy pandas scikit-learn pyyaml
endif
	touch $@

bench: setup .parity/complete ## compare the speed of sampling and scoring with transformers (half an hour)
	cargo build --release --bins --example pictures
	.parity/bin/python benches/speed/bench.py

cluster-test: setup ## run under a real Slurm of three nodes and under torchrun on this machine (as root, on Debian)
	cargo build --release -p ovchat
	benches/cluster/run.sh

# The engine alone has the whole command line. Its libtorch is that of the Python on the GPU machine.
gpu-kit: setup ## pack what the measurements on a GPU need into .gpu, for a machine without Rust and network
	cargo build --release --bins
	rm -rf .gpu && mkdir .gpu
	strip -o .gpu/pipeline-engine "$${CARGO_TARGET_DIR:-target}/release/pipeline-engine"
	xz -6 -T0 .gpu/pipeline-engine
	cp benches/gpu/* .gpu
	du -sh .gpu
	@echo "on the GPU machine, in a copy of this folder: OUT=/tmp/out bash .gpu/run.sh"

# Without its own pip, which Debian ships in a separate package.
.parity/complete: tests/parity/requirements.txt
	rm -rf .parity
	python3 -m venv --without-pip .parity
	python3 -m pip --python .parity/bin/python install --disable-pip-version-check -r $<
	touch $@

.PHONY: tools
tools:
	@command -v cargo >/dev/null || { echo "cargo is missing: install Rust from https://rustup.rs" >&2; exit 1; }
	@command -v c++ >/dev/null || { echo "a C++ compiler is missing: apt-get install g++" >&2; exit 1; }

.PHONY: pip
pip:
	@python3 -m pip --version >/dev/null || { echo "pip is missing: apt-get install python3-pip" >&2; exit 1; }

$(LIBTORCH_COMPLETE): | pip
	@echo "downloading libtorch 2.11.0 into .libtorch: 0.5 GB to download, 1.2 GB on disk"
	rm -rf .libtorch
	$(FETCH) --no-deps $(LIBTORCH_PARTS)
	touch $@

# Without --upgrade, pip does not touch the existing folder `nvidia`.
$(NVIDIA_COMPLETE): $(LIBTORCH_COMPLETE) | pip
	@echo "found an NVIDIA driver ($(NVIDIA_FILE)): downloading NVIDIA's libraries for CUDA 13.0 into .libtorch:" \
	  "2.0 GB to download, 2.7 GB on disk"
	$(FETCH) --upgrade $(NVIDIA_PARTS)
	touch $@

# syntax=docker/dockerfile:1
# For NVIDIA GPUs: what scripts/setup.sh installs. torch's wheels bring CUDA's libraries; the image's compiler and nvcc are
# for kernels that are compiled when they are first used (Triton, FlashInfer), and for flash-attn.
#
#   docker build -t verl-darts .
#   docker build -t verl-darts --build-arg FLASH_ATTN=1 .              with flash-attn, compiled for an hour (docs/smoke.md)
#   docker run --rm --gpus all --ipc=host --network=host --ulimit nofile=65536:65536 verl-darts              the doctor
#   docker run ... --user "$(id -u)" -v "$PWD/outputs:/opt/verl-darts/outputs" verl-darts bash scripts/quickstart.sh
#
# --ipc=host: a container's /dev/shm has 64 MiB. InfiniBand: --device=/dev/infiniband --ulimit memlock=-1.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

# libnuma: verl binds its workers. libibverbs, librdmacm: NCCL's InfiniBand. procps: scripts/test.sh.
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      build-essential ca-certificates git ibverbs-providers libibverbs1 libnuma-dev librdmacm1 procps python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --home-dir /opt/darts --uid 10001 darts \
    && install -d -o darts -g darts /opt/verl-darts /opt/python

# HOME and USER also for `docker run --user`, whose user has neither.
ENV DARTS_DEVICE=gpu \
    DARTS_PYTHON=3.11 \
    HOME=/opt/darts \
    USER=darts \
    UV_LINK_MODE=copy \
    UV_PYTHON_INSTALL_DIR=/opt/python
WORKDIR /opt/verl-darts
USER darts

COPY --chown=darts:darts . .
RUN --mount=type=cache,target=/opt/darts/.cache/uv,uid=10001,gid=10001 \
    bash scripts/setup.sh

# 1: compile flash-attn, for these architectures (80: A100, 90: H100), with so many compilers, of 5 GB each. It would look for
# a wheel for CUDA 12 first.
ARG FLASH_ATTN=0
ARG FLASH_ATTN_CUDA_ARCHS="80;90"
ARG MAX_JOBS=4
ARG FLASH_ATTENTION_FORCE_BUILD=TRUE
RUN --mount=type=cache,target=/opt/darts/.cache/uv,uid=10001,gid=10001 \
    if [ "$FLASH_ATTN" = 1 ]; then \
      .uv/bin/uv pip install --python .venv/bin/python --no-build-isolation-package flash-attn --editable '.[gpu,flash-attn]'; \
    fi

# Whoever runs it may write here.
RUN mkdir -p outputs && chmod 1777 outputs /opt/darts && chmod a+rw .setup.lock

ENV PATH=/opt/verl-darts/.venv/bin:$PATH
CMD ["python", "-m", "darts.doctor"]

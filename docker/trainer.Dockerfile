# finery-trainer: the training service and its workers, with the engine, on CUDA.
# `make images` builds it from the checkout's top folder; docker/README.md tells how the base image is pinned by digest.
# Only the driver's side of CUDA is wanted of it: torch's wheels bring the libraries of CUDA 13.0, which asks for a driver of the series 580.
ARG CUDA_IMAGE=docker.io/nvidia/cuda:13.0.2-base-ubuntu24.04

# Triton compiles a small stub of C for every kernel that it launches, when it runs: hence a C compiler, the C library's headers and Python's.
FROM ${CUDA_IMAGE} AS base
# Versions are the distribution's, of the day on which the base image was pinned and this was built.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev python3 python3-dev \
    && rm -rf /var/lib/apt/lists/*

FROM base AS build
WORKDIR /build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY docker/install.sh docker/requirements.py docker/
COPY pyproject.toml constraints.txt constraints-gpu.txt ./
RUN sh docker/install.sh environment \
    && sh docker/install.sh dependencies --override constraints-gpu.txt trainer gpu tracing
COPY README.md LICENSE ./
COPY protos/gen protos/gen
COPY kernels kernels
COPY services services
RUN sh docker/install.sh finery

FROM base AS runtime
ARG CUDA_IMAGE
ARG VERSION=0.0.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="finery-trainer" \
      org.opencontainers.image.description="Fine-tunes open-weight models: the training service and its workers" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${CUDA_IMAGE}"
COPY --from=build /etc/passwd /etc/group /etc/
COPY --from=build /opt/finery /opt/finery
COPY --from=build --chown=10001:10001 /build/build/state /var/lib/finery
ENV PATH=/opt/finery/bin:$PATH \
    HOME=/var/lib/finery \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    FINERY_STATE_DIR=/var/lib/finery \
    FINERY_METRICS_HOST=0.0.0.0 \
    FINERY_METRICS_PORT=9100 \
    CC=/usr/bin/gcc \
    FINERY_GRPC_ADDRESS=0.0.0.0:9000
WORKDIR /var/lib/finery
USER 10001:10001
EXPOSE 9000 9100
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-m", "finery_common.probe", "grpc://127.0.0.1:9000"]
# A worker is the same image: `python -m finery_trainer.worker`.
ENTRYPOINT ["python", "-m", "finery_trainer"]

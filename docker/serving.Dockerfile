# finery-serving: an agent that keeps one vLLM running and swaps adapters in it, on the image of vLLM.
# `make images` builds it from the checkout's top folder; docker/README.md tells how the base image is pinned by digest.
ARG VLLM_IMAGE=docker.io/vllm/vllm-openai:v0.24.0

FROM ${VLLM_IMAGE} AS build
WORKDIR /build
COPY docker/install.sh docker/requirements.py docker/
COPY pyproject.toml constraints.txt ./
RUN sh docker/install.sh environment \
    && sh docker/install.sh dependencies serving tracing
COPY README.md LICENSE ./
COPY protos/gen protos/gen
COPY kernels kernels
COPY services services
RUN sh docker/install.sh finery

# vLLM stays in the image's own Python, where its torch and kernels are; the agent has an environment beside it and never imports vLLM. The
# C compiler stays as well: Triton and FlashInfer compile when vLLM starts. What they make is kept under HOME, which is writable.
FROM ${VLLM_IMAGE} AS runtime
ARG VLLM_IMAGE
ARG VERSION=0.0.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="finery-serving" \
      org.opencontainers.image.description="Keeps a vLLM running for Finery and swaps LoRA adapters in it" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${VLLM_IMAGE}"
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
    FINERY_GRPC_ADDRESS=0.0.0.0:9000 \
    FINERY_VLLM_PYTHON=/usr/bin/python3
WORKDIR /var/lib/finery
USER 10001:10001
EXPOSE 8443 9000 9100
# The agent answers before vLLM does; that vLLM is ready is told by the agent's routes.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-m", "finery_common.probe", "grpc://127.0.0.1:9000"]
ENTRYPOINT ["python", "-m", "finery_serving"]

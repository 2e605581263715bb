# What is installed in the image IMAGE, as CycloneDX: `make sbom` builds this and takes the one file that it makes.
ARG PYTHON_IMAGE=docker.io/library/python:3.12-slim-bookworm
ARG IMAGE

# hadolint ignore=DL3006
FROM ${IMAGE} AS image

FROM ${PYTHON_IMAGE} AS list
WORKDIR /build
COPY constraints.txt ./
RUN python3 -m venv tools \
    && tools/bin/pip install --no-cache-dir -c constraints.txt cyclonedx-python-lib
COPY docker/sbom.py ./
ARG NAME
ARG VERSION=0.0.0
RUN --mount=type=bind,from=image,target=/image \
    mkdir /sbom \
    && tools/bin/python sbom.py /image --name "${NAME}" --version "${VERSION}" --output "/sbom/${NAME}.cdx.json"

FROM scratch
COPY --from=list /sbom /

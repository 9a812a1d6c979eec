# PerturbScope's service, CPU (default, last stage) or GPU (--target gpu). No torch inside.
#
#   docker build -t perturbscope .
#   docker run -p 3000:3000 -p 3001:3001 --read-only --tmpfs /tmp perturbscope
#   docker run ... -v /my/bundle:/bundle:ro -e PERTURBSCOPE_BUNDLE=/bundle perturbscope
#   docker run ... -v /my/bundles:/models:ro -e PERTURBSCOPE_REPOSITORY=/models perturbscope
#   docker run ... -v /my/secrets:/secrets:ro -e PERTURBSCOPE_KEYS=/secrets/keys.json \
#       -e PERTURBSCOPE_TLS_CERTIFICATE=/secrets/server.pem -e PERTURBSCOPE_TLS_KEY=/secrets/server.key perturbscope
#
# API keys are made by `python -m serving keys`, there or here. The service runs as user 10001, which must be able to
# read the files; it needs no capability and writes only to /tmp. It serves every bundle of bundles/; the one called
# default, or else the first by name, is the default model. --build-arg BUNDLE=bundles/NAME takes along only that one.
#
# BASE_IMAGE may be any Debian bookworm; Python is installed where it is missing. A tag can be moved to another image, so a
# release is built from name:tag@sha256:...: scripts/pin_base.sh writes it here, and scripts/image.sh --release asks for it.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS base
SHELL ["/bin/sh", "-eu", "-c"]
# Debian drops old versions from its mirrors, so a version pinned here would break the build; the release is the pin.
# hadolint ignore=DL3008
RUN if ! python3 -c 'import venv, ensurepip'; then \
        apt-get update; \
        apt-get install --yes --no-install-recommends python3 python3-venv; \
        rm -rf /var/lib/apt/lists/*; \
    fi; \
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; \
    mkdir -p /app /bundle; \
    echo 'perturbscope:x:10001:10001:PerturbScope:/tmp:/usr/sbin/nologin' >> /etc/passwd; \
    echo 'perturbscope:x:10001:' >> /etc/group

# What is downloaded has a hash in requirements/, and is a wheel: no package runs code of its own to be installed.
# Private package index: --build-arg PIP_INDEX_URL=..., or PIP_CONFIG_FILE=... with that file mounted for the build.
FROM base AS wheel
ARG PIP_INDEX_URL
ARG PIP_CONFIG_FILE
WORKDIR /src
ENV PATH=/opt/build/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
COPY requirements/build.txt requirements/build.txt
RUN python3 -m venv /opt/build; \
    pip install --require-hashes --only-binary :all: -r requirements/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY perturbscope perturbscope
RUN pip wheel --no-build-isolation --no-deps --wheel-dir /wheels .

FROM base AS bundles
ARG BUNDLE
COPY bundles /bundles
RUN mkdir /served; \
    if [ -n "${BUNDLE:-}" ]; then cp -r "/${BUNDLE}" /served/; else cp -r /bundles/. /served/; fi

FROM base AS install
WORKDIR /src
ENV PATH=/opt/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
# binutils: one extension of POT carries 160 MB of debugging symbols.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends binutils && rm -rf /var/lib/apt/lists/*; \
    python3 -m venv /opt/venv
# dpkg's list as the image will have it: this stage has more packages.
COPY --from=base /var/lib/dpkg/status dpkg-status

FROM install AS install-cpu
ARG PIP_INDEX_URL
ARG PIP_CONFIG_FILE
COPY requirements/serving.txt requirements/serving.txt
RUN pip install --require-hashes --only-binary :all: --report report.json -r requirements/serving.txt
COPY --from=wheel /wheels /wheels
COPY scripts/slim_venv.sh scripts/distributions.py scripts/sbom.py scripts/
RUN pip install --no-deps --no-index /wheels/*.whl; \
    pip check; \
    scripts/slim_venv.sh /opt/venv
COPY --from=bundles /served bundles
RUN for manifest in bundles/*/manifest.json; do set -- "$@" --bundle "${manifest%/manifest.json}"; done; \
    python scripts/sbom.py --report report.json --dpkg-status dpkg-status "$@" --output sbom.cdx.json

FROM install AS install-gpu
ARG PIP_INDEX_URL
ARG PIP_CONFIG_FILE
COPY requirements/serving-gpu.txt requirements/serving-gpu.txt
RUN pip install --require-hashes --only-binary :all: --report report.json -r requirements/serving-gpu.txt
COPY --from=wheel /wheels /wheels
COPY scripts/slim_venv.sh scripts/distributions.py scripts/sbom.py scripts/
RUN pip install --no-deps --no-index /wheels/*.whl; \
    scripts/slim_venv.sh /opt/venv
COPY --from=bundles /served bundles
RUN for manifest in bundles/*/manifest.json; do set -- "$@" --bundle "${manifest%/manifest.json}"; done; \
    python scripts/sbom.py --report report.json --dpkg-status dpkg-status "$@" --output sbom.cdx.json

FROM base AS runtime
WORKDIR /app
# The code and the bundles belong to root: the service can read and not change them.
COPY serving serving
COPY --from=bundles /served bundles
COPY LICENSE NOTICE ./
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    BENTOML_HOME=/tmp/bentoml \
    BENTOML_DO_NOT_TRACK=True \
    HDF5_PLUGIN_PRELOAD=:: \
    PERTURBSCOPE_HOST=0.0.0.0 \
    PERTURBSCOPE_DRAIN_DELAY=5
EXPOSE 3000 3001
USER 10001:10001
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-m", "serving", "healthcheck"]
CMD ["python3", "-m", "serving"]

FROM runtime AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PERTURBSCOPE_DEVICE=cuda
COPY --from=install-gpu /opt/venv /opt/venv
COPY --from=install-gpu /src/sbom.cdx.json ./

FROM runtime AS cpu
COPY --from=install-cpu /opt/venv /opt/venv
COPY --from=install-cpu /src/sbom.cdx.json ./

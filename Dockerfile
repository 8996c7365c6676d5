# syntax=docker/dockerfile:1
# samf in a container: `samf api` unless another command is given (challenge, serve, report, …). docs/howto/serve.md
#
#   docker build -t samf .
#   docker build -t samf-cuda --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 \
#       --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS base
# CUDA images come without Python; `python:` images have theirs, which stays the one.
# hadolint ignore=DL3008
RUN if ! command -v python3 > /dev/null; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends python3 python3-venv \
        && rm -rf /var/lib/apt/lists/*; \
    fi

FROM base AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=api
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/samf
ENV PATH=/opt/samf/bin:$PATH
# The largest layer first: it changes with torch only.
# hadolint ignore=DL3013
RUN python -m pip install --index-url "${TORCH_INDEX}" torch torchvision
WORKDIR /src
COPY requirements.txt ./
RUN python -m pip install --requirement requirements.txt
COPY . ./samf
# The import fails here, not at the first start, where torch and torchvision are of different builds.
RUN python -m pip install "./samf[${EXTRAS}]" \
    && python -c "from samf import SamfReportPipeline"

FROM base
COPY --from=build /opt/samf /opt/samf
ENV PATH=/opt/samf/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache \
    MPLCONFIGDIR=/tmp/matplotlib
RUN if ! getent passwd 1000 > /dev/null; then useradd --uid 1000 --create-home samf; fi \
    && mkdir -p /cache /input /output \
    && chown 1000:1000 /cache /output
USER 1000:1000
WORKDIR /output
EXPOSE 8000
ENTRYPOINT ["samf"]
CMD ["api", "--host", "0.0.0.0"]

# Rollout workers with vLLM's server beside them. For nodes with CUDA GPUs.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS requirements
WORKDIR /build
COPY docker/requirements pyproject.toml ./
RUN ./requirements train >requirements.txt

FROM ${BASE} AS environment
ARG PACKAGE_INDEX
ARG TORCH_INDEX
ARG TORCH="torch==2.13.0 torchvision==0.28.0"
WORKDIR /build
COPY docker/environment constraints.txt ./
COPY --from=requirements /build/requirements.txt ./
RUN --mount=type=cache,target=/root/.cache/uv ./environment /opt/steadyhelm/venv --constraint constraints.txt \
      --requirement requirements.txt ${TORCH} \
    && echo /opt/steadyhelm/code >/opt/steadyhelm/venv/lib/python3.11/site-packages/code.pth

# The engine's own environment: its pins contradict ours, and Steadyhelm talks to it over HTTP.
FROM ${BASE} AS engine
ARG PACKAGE_INDEX
WORKDIR /build
COPY docker/environment ./
COPY engines engines
RUN --mount=type=cache,target=/root/.cache/uv ./environment /opt/engine --constraint engines/vllm.constraints.txt \
      --requirement engines/vllm.txt ./engines/plugin

FROM environment AS code
COPY README.md LICENSE pyproject.toml ./
COPY system system
COPY operators operators
RUN --mount=type=cache,target=/root/.cache/uv ./environment /opt/steadyhelm/code --no-deps . \
    && /opt/steadyhelm/venv/bin/python -m steadyhelm.weights.compiled

FROM ${BASE}
RUN --mount=type=bind,source=docker/runtime,target=/build/runtime /build/runtime
COPY --from=environment /opt/steadyhelm/venv.made /opt/steadyhelm/
RUN --mount=type=bind,from=environment,source=/opt/steadyhelm/venv,target=/build/venv \
    cp --archive /build/venv /opt/steadyhelm/venv
COPY --from=engine /opt/engine.made /opt/
RUN --mount=type=bind,from=engine,source=/opt/engine,target=/build/engine cp --archive /build/engine /opt/engine
ENV PATH=/opt/steadyhelm/code/bin:/opt/steadyhelm/venv/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1 \
    STEADYHELM_VLLM_PYTHON=/opt/engine/bin/python
USER 10001:10001
WORKDIR /tmp
COPY workloads /opt/steadyhelm/workloads
COPY --from=code /opt/steadyhelm/code /opt/steadyhelm/code
ARG VERSION=0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="steadyhelm-rollout-vllm" \
      org.opencontainers.image.description="Steadyhelm: rollout workers with vLLM" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

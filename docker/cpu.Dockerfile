# Every role in one image, with the Transformers engine: for clusters without GPUs, and for trying out.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS requirements
WORKDIR /build
COPY docker/requirements pyproject.toml ./
RUN ./requirements train digits >requirements.txt

FROM ${BASE} AS environment
ARG PACKAGE_INDEX
ARG TORCH_INDEX
# With TORCH_INDEX a CPU build of torch, which is 4 GB smaller: "torch==2.13.0+cpu torchvision==0.28.0+cpu".
ARG TORCH="torch==2.13.0 torchvision==0.28.0"
WORKDIR /build
COPY docker/environment docker/trim.py constraints.txt ./
COPY --from=requirements /build/requirements.txt ./
RUN --mount=type=cache,target=/root/.cache/uv ./environment /opt/steadyhelm/venv --constraint constraints.txt \
      --requirement requirements.txt ${TORCH} \
    && /opt/steadyhelm/venv/bin/python trim.py \
    && echo /opt/steadyhelm/code >/opt/steadyhelm/venv/lib/python3.11/site-packages/code.pth

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
ENV PATH=/opt/steadyhelm/code/bin:/opt/steadyhelm/venv/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /tmp
COPY workloads /opt/steadyhelm/workloads
COPY --from=code /opt/steadyhelm/code /opt/steadyhelm/code
ARG VERSION=0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="steadyhelm-cpu" \
      org.opencontainers.image.description="Steadyhelm: every role, without GPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

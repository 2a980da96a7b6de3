# docker build -t nibble --build-arg PIP_EXTRA_INDEX_URL=<PyTorch's CPU index> .
# docker build -t nibble:cuda --target cuda .          PyPI's torch brings CUDA along
# docker run --read-only --tmpfs /tmp -v nibble:/data -p 127.0.0.1:8080:8080 -e NIBBLE_ADMIN_KEY nibble
#
# BASE is any Debian or Ubuntu; where it has no Python, the distribution's is installed (3.11 or newer).
# EXTRAS=otel,postgres,rag,redis adds what those need. Nothing but the embedded base is inside: no other weights.
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
ARG PIP_EXTRA_INDEX_URL PIP_INDEX_URL PIP_FIND_LINKS PIP_NO_INDEX
ARG EXTRAS=
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev libgomp1 \
    && { command -v python3 || apt-get install -y --no-install-recommends python3 python3-venv; } \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
RUN python3 -m venv /opt/nibble
ENV PATH=/opt/nibble/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY constraints.txt ./
RUN pip install -c constraints.txt setuptools torch transformers bitsandbytes
COPY . .
# One C library for all processors: which instructions it uses is decided when it runs.
RUN pip install -c constraints.txt --no-build-isolation ".${EXTRAS:+[$EXTRAS]}" \
    && nibble --version

FROM ${BASE} AS runtime
# libgomp: OpenMP for the CPU kernels.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && { command -v python3 || apt-get install -y --no-install-recommends python3; } \
    && rm -rf /var/lib/apt/lists/* \
    && echo 'nibble:x:10001:10001::/data:/usr/sbin/nologin' >> /etc/passwd \
    && echo 'nibble:x:10001:' >> /etc/group \
    && mkdir /data && chown 10001:10001 /data
COPY --from=build /opt/nibble /opt/nibble
# Everything that is written goes to /data, or to /tmp: the root can be read-only.
ENV PATH=/opt/nibble/bin:$PATH HOME=/data NIBBLE_HOME=/data HF_HOME=/data/hub \
    NIBBLE_HOST=0.0.0.0 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=60s --interval=10s --timeout=5s CMD ["python", "-c", \
    "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.getenv('NIBBLE_PORT', '8080') + '/health', timeout=3)"]
ENTRYPOINT ["nibble"]
CMD ["serve"]

FROM runtime AS cuda
# Triton compiles the launcher of a kernel with the C compiler that it finds.
USER 0
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && { [ -d /usr/local/include/python3* ] || apt-get install -y --no-install-recommends python3-dev; } \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TRITON_CACHE_DIR=/data/triton
USER 10001:10001

# What a plain `docker build` makes.
FROM runtime AS cpu

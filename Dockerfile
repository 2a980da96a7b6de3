# docker build -t nibble . && docker run -p 8080:8080 -v nibble:/data nibble
#
# pip takes the CUDA build of torch unless it is offered a smaller one: for a CPU-only image pass
# PyTorch's CPU index with --build-arg PIP_EXTRA_INDEX_URL=...

FROM python:3.11-slim AS build
ARG PIP_EXTRA_INDEX_URL
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev libgomp1 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
RUN python -m venv /opt/nibble
ENV PATH=/opt/nibble/bin:$PATH
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt setuptools torch transformers bitsandbytes
COPY . .
RUN pip install --no-cache-dir -c constraints.txt --no-build-isolation .

FROM python:3.11-slim
# libgomp: OpenMP for the CPU kernels.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 nibble && mkdir /data && chown nibble /data
COPY --from=build /opt/nibble /opt/nibble
ENV PATH=/opt/nibble/bin:$PATH NIBBLE_HOME=/data NIBBLE_HOST=0.0.0.0
USER nibble
WORKDIR /data
VOLUME /data
EXPOSE 8080
HEALTHCHECK --start-period=60s CMD ["python", "-c", \
    "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/health', timeout=3)"]
ENTRYPOINT ["nibble"]
CMD ["serve"]

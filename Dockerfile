# wan-serve in a container.
#
#   docker build --tag wan-runtime .
#   docker run --init --gpus all --publish 127.0.0.1:8000:8000 --volume ./models:/models:ro --volume wan-data:/data \
#       wan-runtime --checkpoint /models/wan2.1-t2v-14b-nvfp4.safetensors --base /models/Wan2.1-T2V-14B-Diffusers
#
# Without --checkpoint it serves the bundled tiny model. Every option of wan-serve can also be given as WAN_SERVE_...
# in the environment. BASE_IMAGE is any Debian or Ubuntu image whose python3 is 3.11 or newer.
ARG BASE_IMAGE=nvidia/cuda:13.0.1-runtime-ubuntu24.04

FROM ${BASE_IMAGE} AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
# "serve,fast" adds FlashAttention 3, for Hopper GPUs; "serve,otel" OpenTelemetry's spans (--otlp-endpoint).
ARG EXTRAS=serve
ENV PIP_CONSTRAINT=/src/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python3 -m venv /opt/wan
# The dependencies are a layer of their own: a change of the code does not download torch again.
COPY pyproject.toml constraints.txt ./
RUN /opt/wan/bin/python -c 'import sys, tomllib; \
project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
extras = project["optional-dependencies"]; \
wanted = [*project["dependencies"], *extras["diffusers"]]; \
wanted += [want for name in sys.argv[1].split(",") for want in extras[name]]; \
print(*(want for want in wanted if not want.startswith("wan-runtime")), sep="\n")' "${EXTRAS}" > wanted.txt \
    && /opt/wan/bin/pip install --no-cache-dir --requirement wanted.txt
COPY README.md LICENSE ./
COPY wan_runtime wan_runtime
COPY patches patches
COPY serve serve
COPY models models
RUN /opt/wan/bin/pip install --no-cache-dir --no-deps .

FROM ${BASE_IMAGE}
# Triton compiles its kernels' launchers at the first use: hence a compiler and Python's headers.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 wan \
    && install --directory --owner=wan --group=wan /models /data
COPY --from=build /opt/wan /opt/wan
# A container's own loopback cannot be reached from outside it, so here, and only here, the server listens on every
# address; it has no authentication unless it is given keys. `--publish 127.0.0.1:8000:8000`, as above, keeps it to
# the host; let nothing wider through without an authenticating proxy before it.
# They are environment variables, not a CMD, so that arguments to `docker run` add to them instead of replacing them.
ENV PATH=/opt/wan/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/data/huggingface \
    WAN_SERVE_HOST=0.0.0.0 \
    WAN_SERVE_PORT=8000 \
    WAN_SERVE_ALLOW_REMOTE=1 \
    WAN_SERVE_DATA_DIR=/data
USER wan
WORKDIR /data
VOLUME ["/models", "/data"]
EXPOSE 8000
# Ready means that the model is loaded and its worker lives: a large checkpoint takes minutes, hence the start period.
HEALTHCHECK --interval=15s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"WAN_SERVE_PORT\"]}/readyz', timeout=4)"]
ENTRYPOINT ["wan-serve"]

# A block server that runs on CPUs:
#   docker build -t geopetals .
#   docker run --network host -v geopetals:/data geopetals MODEL --join TOKEN --host 0.0.0.0
# For NVIDIA GPUs build with --build-arg TORCH_BACKEND=cu130 and run with --gpus all. The wheels of torch bring CUDA's
# libraries, so that the base image needs none. BASE_IMAGE may be any image that has Python 3.11 or later and useradd.
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS build
ARG TORCH_BACKEND=cpu
ENV VIRTUAL_ENV=/opt/geopetals UV_LINK_MODE=copy
RUN python3 -m venv /opt/uv \
    && /opt/uv/bin/pip install --no-cache-dir uv \
    && /opt/uv/bin/uv venv --python "$(command -v python3)" ${VIRTUAL_ENV}
WORKDIR /src
# The dependencies alone, so that a change of the code does not install them again.
COPY pyproject.toml constraints.txt ./
RUN /opt/uv/bin/uv pip install --no-cache --torch-backend "${TORCH_BACKEND}" --constraint constraints.txt \
        --requirement pyproject.toml --extra quantization \
    && /opt/uv/bin/uv pip install --no-cache --no-deps petals==2.2.0.post1
COPY README.md LICENSE NOTICE ./
COPY geopetals geopetals
RUN /opt/uv/bin/uv pip install --no-cache --no-deps .

FROM ${BASE_IMAGE}
# A new named volume takes the owner of the folder that it is mounted on.
RUN useradd --create-home --uid 10001 geopetals && install -d -o geopetals -g geopetals /data /state /tokens
COPY --from=build /opt/geopetals /opt/geopetals
ENV PATH=/opt/geopetals/bin:${PATH} \
    GEOPETALS_CACHE=/data/geopetals \
    HF_HOME=/data/huggingface \
    PYTHONUNBUFFERED=1
USER geopetals
WORKDIR /data
VOLUME /data
STOPSIGNAL SIGTERM
# Whatever this container runs, it answers at HEALTH_URL: a server at its --metrics-port, a coordinator or a gateway at
# /health or /version. Run servers with --metrics-port 31381, or set HEALTH_URL.
ENV HEALTH_URL=http://127.0.0.1:31381/metrics
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=6 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(os.environ['HEALTH_URL'], timeout=4)"]
ENTRYPOINT ["geopetals", "serve"]
CMD ["--help"]

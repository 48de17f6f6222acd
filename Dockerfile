# Two images. Training, with CUDA:   docker build --target train -t gensr:train .
# Serving, on the CPU:               docker build --target serve -t gensr:serve .
#
#   docker run --gpus all --ipc host -v "$PWD:/work" gensr:train train demo data.dir=data/mine run.dir=runs/mine
#   docker run -p 8000:8000 -v "$PWD/runs:/work/runs:ro" gensr:serve
# constraints.txt pins the packages; the service runs without root.

FROM python:3.11-slim-bookworm AS base
# hadolint ignore=DL3064
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 MLFLOW_DISABLE_TELEMETRY=true TOKENIZERS_PARALLELISM=false
RUN useradd --create-home --uid 1000 gensr && mkdir /work && chown gensr /work
WORKDIR /src
COPY setup.cfg pyproject.toml README.md LICENSE constraints.txt ./
COPY gensr gensr
COPY trainer trainer
COPY data_shards data_shards
COPY ds_configs ds_configs
COPY slurm slurm

FROM base AS serve
# TORCH_INDEX: where the CPU build of torch lies; empty takes the default index's, which brings CUDA
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} '.[serve]'
USER 1000
WORKDIR /work
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["gensr"]
CMD ["serve", "runs/mine", "--host", "0.0.0.0", "--port", "8000"]

FROM base AS train
# for model.compile, and for DeepSpeed's own operators where a JSON asks for them: a compiler
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
RUN pip install -c constraints.txt '.[train,serve,qlora]'
USER 1000
WORKDIR /work
ENTRYPOINT ["gensr"]
CMD ["--help"]

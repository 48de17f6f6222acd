# shellcheck shell=bash disable=SC2034,SC1091
# What is particular to your site. Copy it to slurm/env.sh (git ignores it) in the folder that you submit from and keep the lines you need; every job
# script reads it first, on the first node of the job, and what it exports reaches all nodes. GENSR_ENV=FILE names another file.

# ---- Python with gensr: an environment on a file system that all nodes see, or a container ------------------------
# module purge; module load gcc cuda
source .venv/bin/activate

# pyxis: the image is unpacked once a node; the folder that you submit from, data and runs must be mounted
# SRUN_ARGS=(--container-image=/shared/gensr.sqsh --container-mounts=/shared:/shared --container-workdir="$PWD")
# apptainer: --nv brings the driver in; srun's variables reach the container by themselves
# NODE_PREFIX=(apptainer exec --nv --bind /shared --pwd "$PWD" /shared/gensr.sif)

# ---- network: the interface that the nodes reach each other by (`ip -br addr` on a node) --------------------------
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5 NCCL_DEBUG=WARN
# export TORCH_NCCL_ASYNC_ERROR_HANDLING=1   # torch's default: a rank whose peer is gone ends after run.timeout_s

# ---- offline nodes: fetch backbones on the login node first, into the same HF_HOME --------------------------------
# export HF_HOME=/shared/$USER/huggingface HF_HUB_OFFLINE=1

# ---- tracking. Secrets come from a file that only you can read (chmod 600), never from a command line -------------
# export MLFLOW_TRACKING_URI=https://mlflow.example.org
# MLFLOW_TRACKING_TOKEN=$(<"$HOME/.config/gensr/mlflow-token"); export MLFLOW_TRACKING_TOKEN
# Nodes that do not reach the server: leave MLFLOW_TRACKING_URI out, and on the login node, any time: gensr runs import runs/mlflow.db --into URI

# ---- what the job scripts read -------------------------------------------------------------------------------------
# export GENSR_MAX_RESTARTS=20              # attempts after the first, by whatever cause
# export GENSR_SCRATCH=/scratch/$USER/gensr # node-local: shards and catalogue, fetched once a node and kept for later jobs (read where they are)
# export GENSR_LOCAL_CACHE=/scratch/$USER   # node-local: compiled kernels (${TMPDIR:-/tmp}/gensr-USER)
# Of a job that sbatch gets without `gensr submit`, which has options for these:
# export GENSR_DEEPSPEED=zero3.json         # one of ds_configs/, or a path (zero2.json)
# export GENSR_PROCESSES_PER_NODE=4         # fewer than there are GPUs
# export GENSR_CPU=1                        # no GPU: gloo, one process a node unless GENSR_PROCESSES_PER_NODE says otherwise

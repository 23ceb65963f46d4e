# What differs from cluster to cluster; train.sbatch sources this on the first node, and srun passes the environment on to all.
# Edit it for yours. Partition, account and time limit are sbatch's: give them on its command line or in SBATCH_* variables.

# The Python environment, on a file system that every node sees; `source scripts/setup_env.sh` has made it.
if [ -f .venv/bin/activate ]; then
    source .venv/bin/activate
fi

# Modules, if your cluster has them:
#   module load cuda

# Network: name the interface if NCCL or gloo picks the wrong one.
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Where the ranks of several nodes meet: the first node, at a port that depends on the job.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

# Settings of your cluster. train.sbatch sources this file on the first node, and srun passes the environment to all nodes.
# Edit it. Partition, account and time limit are sbatch's: give them on its command line or in SBATCH_* variables.

# The Python environment, on a file system that every node can read; `source scripts/setup_env.sh` has made it.
if [ -f .venv/bin/activate ]; then
    source .venv/bin/activate
fi

# Modules, if your cluster has them:
#   module load cuda

# Network: name the interface if NCCL or gloo picks the wrong one.
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# The rendezvous of the ranks of several nodes: the first node, at a port that depends on the job.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

# shellcheck shell=bash
# Sourced by each rank of launch/pretrain_large.sbatch: what ranks on a cluster need besides launch/env.sh.
# What is already set stays, so export your own value before sbatch. None of it is needed on a single machine.

# The threads a rank may use are the cores that SLURM gave its task; env.sh would count all cores of the machine.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
# NCCL tells why a connection failed and is silent otherwise. INFO also shows which network it chose.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# A collective that fails ends its rank, instead of leaving it with wrong numbers or in a wait. Torch's default, pinned.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# NCCL and gloo choose a network interface by themselves. Where a node has one that the others cannot reach, name the
# right one: export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0. `trainer doctor` lists those that exist.

# SLURM brings the limits of the shell that called sbatch. InfiniBand and pinned memory need locked memory; decoded
# batches on their way from workers each hold files open.
ulimit -S -l "$(ulimit -H -l)" 2>/dev/null || true
ulimit -S -n "$(ulimit -H -n)" 2>/dev/null || true

# Lines are in the log when they are said, and a crash inside a library shows where Python was.
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1

# shellcheck source=launch/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

#!/bin/bash
# Two nodes with four GPUs each: `sbatch examples/slurm.sh`. Lightning reads the ranks from SLURM; a job that ends at its
# time limit is queued again, and goes on from the checkpoint that it wrote on SIGUSR1: its folder bears its number, since
# Lightning takes any checkpoint of a requeued job that it finds there.
#SBATCH --job-name=lightning-peft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --signal=SIGUSR1@120
#SBATCH --requeue

export NCCL_DEBUG=WARN

srun lightning-peft fit --config configs/instruct.yaml \
  --trainer.num_nodes 2 --trainer.devices 4 --trainer.strategy peft_ddp \
  --trainer.default_root_dir "${SLURM_SUBMIT_DIR:-.}/runs/slurm-${SLURM_JOB_ID}"

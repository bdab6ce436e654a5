"""Starting training: on this machine (`local`, `probe`, `torchrun`), or as a SLURM job (`slurm`, `job.sbatch`)."""

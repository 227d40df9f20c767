"""Every special case of Accelerate and DeepSpeed, and nowhere else."""

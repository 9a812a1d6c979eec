"""Training: from raw counts to a checkpoint. Needs torch, transformers and, on several GPUs, DeepSpeed."""

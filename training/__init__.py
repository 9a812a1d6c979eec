"""Training: from raw counts to a checkpoint. Needs torch, transformers and, on several GPUs, DeepSpeed."""

import os

# Torch's large tensors on huge pages, where the kernel lends them: touching 125 MB of new memory takes 45 ms in small
# pages and 11 ms in huge ones. Torch reads it when it first allocates, so it is set before torch is imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

"""Training: from raw counts to a checkpoint. It may import perturbscope, but not serving, export or evaluation.

Folders from the ground up: config, data, families, loop, objectives, measure, commands; each imports only what stands
before it. checkpoint stands between families and loop; console and errors import nothing of training.
"""

import os

# Puts large tensors of torch on huge pages, where the kernel grants them: touching 125 MB of new memory takes 45 ms in
# small pages and 11 ms in huge ones. Torch reads it when it first allocates, so it is set before torch is imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

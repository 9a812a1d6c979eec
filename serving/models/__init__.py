"""The models that are served: found, loaded, proved, swapped and unloaded."""

"""One loop for every objective: engine, optimizer, resuming, log, provenance."""

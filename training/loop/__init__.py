"""One loop for every objective: engine, optimizer, resuming, log; imports no objective, measurement or command."""

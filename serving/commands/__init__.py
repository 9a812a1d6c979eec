"""What is typed: keys, health check, and the checks before the server starts."""

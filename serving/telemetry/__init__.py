"""What is seen of the server from outside: metrics and traces. The log is :mod:`serving.telemetry.log`."""

"""The service under load beside a plain BentoML endpoint."""

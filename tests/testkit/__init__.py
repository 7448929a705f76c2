"""Real parts for tests: a model hub, an S3 server, tiny random models. Imported by tests alone."""

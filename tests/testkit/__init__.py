"""Real parts for tests: a model hub, an S3 server, and tiny random models. Only tests import it."""

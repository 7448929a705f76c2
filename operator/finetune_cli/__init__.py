"""The command line, `finetune` and `kubectl finetune`, which works without a cluster.

It is thin: it calls functions of the operator, of the trainer and of the API package.
"""

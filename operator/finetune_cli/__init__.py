"""`finetune` and `kubectl finetune`: validate, plan, run without a cluster. Thin: it calls the others' functions."""

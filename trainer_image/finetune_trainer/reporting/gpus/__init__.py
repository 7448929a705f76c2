"""What the GPUs of a pod report through NVML, and what is made of it: metrics and faults."""

"""What runs in the pods: a supervisor (PID 1) and the ranks that it starts. No cluster rights, no
client library."""

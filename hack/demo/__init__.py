"""`make demo`: a throw-away cluster, the operator by Helm, the quickstart followed to its end, and what came out."""

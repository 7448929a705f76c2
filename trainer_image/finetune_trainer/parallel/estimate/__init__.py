"""Parts of the memory estimate, and the estimate of speed."""

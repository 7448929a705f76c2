"""Gets the checkpoint or the adapter of another job from which a job starts."""

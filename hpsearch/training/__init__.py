"""Training, and all else that needs torch: data, user code, the default loop, checkpoints, the executor of jobs."""

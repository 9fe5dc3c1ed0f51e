"""Files made by chance: each is answered with a checkpoint or one of our errors, in no more memory than its size."""

"""A model of how fast a GPU would compute the trainer's step, from the kernels that it launches."""

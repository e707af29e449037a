"""What MLX says, as what it means."""

# The device's memory, on a CPU, on Metal and on CUDA, in errors that are RuntimeErrors.
FULL = ("Unable to allocate", "Attempting to allocate", "Insufficient Memory", "OutOfMemory", "out of memory")

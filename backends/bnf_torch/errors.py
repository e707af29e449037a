"""What PyTorch says, as what it means."""

FULL = ("out of memory", "can't allocate memory")  # the device's memory, in errors that are RuntimeErrors

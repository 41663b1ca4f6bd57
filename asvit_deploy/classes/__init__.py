"""What a network's outputs are called, in which order, and which of them a data folder means."""

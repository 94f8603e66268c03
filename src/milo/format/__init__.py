"""The vocabulary every other room shares: bit packing and the description of one compressed matrix."""

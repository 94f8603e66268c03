"""The plan: for every matrix its bits, grid and rank, and therefore its exact bytes, before anything is computed."""

"""The solver: pure tensor functions that turn a stack of matrices into codes and factors.

They know no files and no models; every function takes a stack `[E, N, K]`, so that experts are solved together.
"""

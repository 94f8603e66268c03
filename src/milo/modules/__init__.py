"""`torch.nn` modules that hold compressed weights and stay packed in memory."""

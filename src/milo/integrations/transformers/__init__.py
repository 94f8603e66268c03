"""transformers: structure of its models, the `milo` quantizer, compression of models in memory."""

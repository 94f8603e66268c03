"""Operations on compressed matrices. They know tensors and encodings, never models."""

"""AFR-St: pruning the MLP layers of large language models."""

"""Sources, data sets, mixtures and collate."""

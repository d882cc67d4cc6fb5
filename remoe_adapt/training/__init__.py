"""Training a router adapter: the objective, the data, and the Trainer."""

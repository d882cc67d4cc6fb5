"""Turning the dial while the model runs: `swap` writes weights, `controller` decides, `load` puts it all together."""

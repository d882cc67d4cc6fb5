"""The dial at run time: sensors, resident-mode swaps, the controller that is the only writer of strength."""

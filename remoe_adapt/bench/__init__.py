"""The benchmarks behind `remoe bench`, each against its named baselines."""

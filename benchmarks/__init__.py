"""What is claimed, as commands: `python -m benchmarks NAME`."""
